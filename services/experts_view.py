"""The heat map of a model's experts for a terminal: a row per layer, a cell per expert, and how even the ranks are.

A cell's colour says how its share compares with an even one: dark where little comes, bright where much does. The
numbers and shades say the same without colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cluster.expert_load import ExpertLoad
from services.expert_counts import ModelExperts

# Up to this many experts a cell shows its share in per cent; more get one character each.
MAX_NUMBERED_EXPERTS = 16
NUM_SHOWN_PAIRS = 5
_NUM_FITTING_STEPS = 60
_SHADES = " ·░▒▓█"
# From nothing over even to several times an even share: dark violet, red, yellow.
_COLOURS = (
    (0.0, (28, 16, 68)),
    (0.5, (101, 26, 128)),
    (1.0, (183, 55, 121)),
    (2.0, (251, 136, 97)),
    (4.0, (252, 253, 191)),
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TogetherPair:
    """Two experts of a layer: the share of tokens that chose both, and what chance would give."""

    layer: int
    experts: tuple[int, int]
    share: float
    by_chance: float


def picture(experts: ModelExperts) -> RenderableType:
    """All copies of the model in one heat map, and each copy's ranks below it."""
    load = experts.total
    parts: list[RenderableType] = [_heading(experts.model, load)]
    if not load.num_tokens:
        return Group(*parts, Text("No token has gone through it yet. Ask the model something."))
    parts += [_cells(load), _legend(load)]
    parts += [_ranks(gang.name, gang.load) for gang in experts.gangs if gang.load.num_ranks > 1]
    parts += [
        Text(f"gang {gang.name}: vLLM moves its experts between the ranks by load (EPLB), so no rank has figures.")
        for gang in experts.gangs
        if gang.load.is_balanced
    ]
    if pairs := strongest_pairs(load, NUM_SHOWN_PAIRS):
        parts.append(_pairs(pairs))
    return Group(*parts)


def strongest_pairs(load: ExpertLoad, limit: int) -> list[TogetherPair]:
    """The pairs of experts that are chosen together most beyond chance, over all layers, strongest first."""
    if load.experts_per_token < 2:
        return []
    found = []
    for layer, pairs in enumerate(load.pairs):
        num_tokens = int(load.tokens[layer].sum()) / load.experts_per_token
        if not num_tokens:
            continue
        by_chance = _pairs_by_chance(load.tokens[layer] / num_tokens, load.experts_per_token)
        for one, two in zip(*np.triu_indices(load.num_experts, 1), strict=True):
            pair = (int(one), int(two))
            found.append(TogetherPair(layer, pair, float(pairs[pair] / num_tokens), float(by_chance[pair])))
    return sorted(found, key=lambda pair: pair.by_chance - pair.share)[:limit]


def _pairs_by_chance(chosen: Floats, experts_per_token: int) -> Floats:
    """How often two experts meet when nothing but their popularity decides, as [expert, expert].

    `chosen[expert]` is the share of tokens that choose an expert. The table is a product of one weight per expert
    with an empty diagonal, fitted to the shares by iterative scaling (Deming and Stephan 1940).
    """
    wanted = chosen * (experts_per_token - 1)
    weights: Floats = chosen.copy()
    for _ in range(_NUM_FITTING_STEPS):
        table: Floats = np.outer(weights, weights).astype(np.float64)
        np.fill_diagonal(table, 0.0)
        sums = table.sum(axis=1)
        weights *= np.sqrt(np.divide(wanted, sums, out=np.zeros(len(sums)), where=sums > 0))
    return table


def _heading(title: str, load: ExpertLoad) -> Text:
    seconds = max(0.0, load.until - load.since)
    return Text.assemble(
        (title, "bold"),
        f"  {load.num_layers} layers of {load.num_experts} experts, {load.experts_per_token} per token;",
        f" {load.num_tokens} tokens in {_duration(seconds)}",
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _cells(load: ExpertLoad) -> Table:
    is_numbered = load.num_experts <= MAX_NUMBERED_EXPERTS
    table = Table(box=None, padding=0, header_style="dim")
    table.add_column("layer ", justify="right", style="dim")
    if is_numbered:
        for expert in range(load.num_experts):
            table.add_column(f"{expert:>4} ", justify="right")
    else:
        table.add_column(f"experts 0 to {load.num_experts - 1}")
    table.add_column("  max/mean", justify="right")
    shares, imbalance = load.shares(), _imbalance_of_experts(load)
    for layer in range(load.num_layers):
        even = shares[layer] * load.num_experts
        cells = [_cell(share, level, is_numbered) for share, level in zip(shares[layer], even, strict=True)]
        row = cells if is_numbered else [Text.assemble(*cells)]
        table.add_row(f"{layer} ", *row, f"{imbalance[layer]:.2f}")
    return table


def _imbalance_of_experts(load: ExpertLoad) -> Floats:
    """Over ranks where the experts are spread, else over the experts themselves."""
    return load.imbalance() if load.num_ranks > 1 else load.shares().max(axis=1) * load.num_experts


def _cell(share: float, level: float, is_numbered: bool) -> Text:
    colour = _colour(level)
    if not is_numbered:
        return Text(_SHADES[min(len(_SHADES) - 1, round(level * 2))], style=Style(color=colour))
    # Dark text on bright cells, bright text on dark ones.
    ink = "#000000" if level > 1.5 else "#ffffff"
    return Text(f"{share:4.0%} ", style=Style(color=ink, bgcolor=colour))


def _colour(level: float) -> str:
    """Between the two named colours around `level`, which is 1 for an even share."""
    level = min(level, _COLOURS[-1][0])
    for (low, dark), (high, bright) in pairwise(_COLOURS):
        if level <= high:
            part = (level - low) / (high - low)
            mixed = (round(a + part * (b - a)) for a, b in zip(dark, bright, strict=True))
            return "#" + "".join(f"{value:02x}" for value in mixed)
    raise AssertionError("the last colour is the limit")


def _legend(load: ExpertLoad) -> Text:
    line = Text("share of a layer's tokens  ", style="dim")
    for level in (0.0, 0.5, 1.0, 2.0, 4.0):
        line.append_text(_cell(level / load.num_experts, level, is_numbered=True))
    return line.append(f"  max/mean of the {'ranks' if load.num_ranks > 1 else 'experts'}", style="dim")


def _ranks(name: str, load: ExpertLoad) -> Group:
    tokens = load.rank_tokens()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("rank", "pairs computed", "share", "busiest in", "experts of layer 0"):
        table.add_column(heading, justify="left" if heading.startswith("experts") else "right")
    total = int(tokens.sum())
    for rank in range(load.num_ranks):
        held = ",".join(str(expert) for expert in np.flatnonzero(load.rank_of[0] == rank))
        busiest = int((tokens.argmax(axis=1) == rank).sum())
        mine = int(tokens[:, rank].sum())
        table.add_row(str(rank), str(mine), f"{mine / total:.1%}" if total else "-", f"{busiest} layers", held)
    imbalance = load.imbalance()
    title = Text.assemble(
        (f"gang {name}", "bold"),
        f"  busiest rank against the mean: {imbalance.mean():.3f}, {imbalance.max():.3f} in layer {imbalance.argmax()}",
    )
    return Group(title, table)


def _pairs(pairs: Sequence[TogetherPair]) -> Text:
    listed = (
        f"layer {pair.layer}: {pair.experts[0]}+{pair.experts[1]} {pair.share:.0%} (by chance {pair.by_chance:.0%})"
        for pair in pairs
    )
    return Text.assemble(("Chosen together most beyond chance", "bold"), *(f"\n  {line}" for line in listed))
