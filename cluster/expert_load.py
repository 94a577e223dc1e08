"""What an engine counted of its experts: tokens routed to each, and which experts were chosen together.

Only arrays and their arithmetic; counting is the engine's business, saving that of the routing trace. Counts are whole
numbers of tokens since the engine began to count, so two readings can be subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import LoadError

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoad:
    """Counts of one engine, each token counted once in each layer.

    `tokens[layer, expert]`: tokens that the router sent to this expert. `pairs[layer, a, b]`: tokens that went to both
    a and b; symmetric, and `pairs[layer, e, e] == tokens[layer, e]`, so that a row sums to experts-per-token times its
    diagonal. `rank_of[layer, expert]`: the expert-parallel rank of the gang that computes this expert, 0 to
    `num_ranks` - 1. In a data-parallel gang each engine counts only the tokens that it routed itself (and not those
    that other ranks sent to its experts), so that the sum over the engines counts every token once; all engines of a
    gang give the same `gang`, `rank_of` and `num_ranks`. `since` and `until` are Unix times in seconds.
    """

    tokens: Counts
    pairs: Counts
    rank_of: Counts
    num_ranks: int
    experts_per_token: int
    since: float
    until: float
    gang: str = ""
    """Which gang of ranks the engine belongs to; empty: it is no member of one and computes all experts itself."""
    is_balanced: bool = False
    """Whether the engine moves experts between its ranks while it runs (EPLB). Then nothing can be said of a rank:
    `num_ranks` is 1 and `rank_of` 0, and there are no figures per rank."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_layers(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens that went through the layer that saw most of them."""
        return int(self.tokens.sum(axis=1).max()) // self.experts_per_token

    def rank_tokens(self) -> Counts:
        """(token, expert) pairs that each rank had to compute, as [layer, rank]; no ranks where nobody can tell."""
        if self.is_balanced:
            return np.zeros((self.num_layers, 0), np.int64)
        result = np.zeros((self.num_layers, self.num_ranks), np.int64)
        for layer in range(self.num_layers):
            np.add.at(result[layer], self.rank_of[layer], self.tokens[layer])
        return result

    def shares(self) -> NDArray[np.float64]:
        """Part of a layer's (token, expert) pairs that each expert got, as [layer, expert]; 0 where nothing came."""
        totals = self.tokens.sum(axis=1, keepdims=True)
        return np.divide(self.tokens, totals, out=np.zeros(self.tokens.shape), where=totals > 0)

    def imbalance(self) -> NDArray[np.float64]:
        """Of each layer: busiest rank's pairs divided by the mean of the ranks; 1.0 is even, and so is no load. Empty
        where nobody can tell what a rank computes."""
        if self.is_balanced:
            return np.zeros(0)
        ranks = self.rank_tokens()
        means = ranks.mean(axis=1)
        return np.divide(ranks.max(axis=1), means, out=np.ones(len(means)), where=means > 0)

    def minus(self, earlier: ExpertLoad) -> ExpertLoad:
        """What came after an `earlier` reading of the same engines; everything, where they were restarted since."""
        if earlier.tokens.shape != self.tokens.shape or (self.pairs < earlier.pairs).any():
            return self
        return replace(self, tokens=self.tokens - earlier.tokens, pairs=self.pairs - earlier.pairs, since=earlier.until)

    def to_json(self) -> dict[str, Any]:
        """As plain data for the wire; `from_json` reads it."""
        return {
            "tokens": self.tokens.tolist(),
            "pairs": self.pairs.tolist(),
            "rank_of": self.rank_of.tolist(),
            "num_ranks": self.num_ranks,
            "experts_per_token": self.experts_per_token,
            "since": self.since,
            "until": self.until,
            "gang": self.gang,
            "is_balanced": self.is_balanced,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> ExpertLoad:
        """Raises `LoadError` for anything that `to_json` cannot have written."""
        try:
            arrays = {name: np.array(data[name], np.int64) for name in ("tokens", "pairs", "rank_of")}
            return ExpertLoad(
                **arrays,
                num_ranks=int(data["num_ranks"]),
                experts_per_token=int(data["experts_per_token"]),
                since=float(data["since"]),
                until=float(data["until"]),
                gang=str(data["gang"]),
                is_balanced=bool(data.get("is_balanced", False)),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise LoadError(f"These are no counts of experts ({type(error).__name__}: {error}).") from error


def sum_loads(loads: Sequence[ExpertLoad]) -> ExpertLoad:
    """The counts of the engines of one gang (or of replicas with the same placement) together."""
    if not loads:
        raise LoadError("There are no counts of experts to add up.")
    first = loads[0]
    for load in loads[1:]:
        if (load.tokens.shape, load.experts_per_token) != (first.tokens.shape, first.experts_per_token):
            raise LoadError(
                f"Counts of {load.num_layers} layers with {load.experts_per_token} of {load.num_experts} experts "
                f"cannot be added to those of {first.num_layers} layers with {first.experts_per_token} of "
                f"{first.num_experts}."
            )
        is_alike = (load.num_ranks, load.is_balanced) == (first.num_ranks, first.is_balanced)
        if not is_alike or not np.array_equal(load.rank_of, first.rank_of):
            raise LoadError("Counts of engines that place the experts differently have no common load per rank.")
    return ExpertLoad(
        tokens=np.sum([load.tokens for load in loads], axis=0, dtype=np.int64),
        pairs=np.sum([load.pairs for load in loads], axis=0, dtype=np.int64),
        rank_of=first.rank_of,
        num_ranks=first.num_ranks,
        experts_per_token=first.experts_per_token,
        since=min(load.since for load in loads),
        until=max(load.until for load in loads),
        gang=first.gang if all(load.gang == first.gang for load in loads) else "",
        is_balanced=first.is_balanced,
    )


def _check(load: ExpertLoad) -> None:
    if load.tokens.ndim != 2 or 0 in load.tokens.shape:
        raise LoadError(f"Counts of experts are a table [layer, expert], not an array of shape {load.tokens.shape}.")
    layers, experts = load.tokens.shape
    if load.pairs.shape != (layers, experts, experts) or load.rank_of.shape != (layers, experts):
        raise LoadError(
            f"Counts of {layers} layers and {experts} experts need pairs of shape {(layers, experts, experts)} and "
            f"ranks of shape {(layers, experts)}, not {load.pairs.shape} and {load.rank_of.shape}."
        )
    for name in ("tokens", "pairs", "rank_of"):
        array = getattr(load, name)
        if array.dtype != np.int64:
            raise LoadError(f"{name} are whole numbers of 64 bits, not {array.dtype}.")
        if (array < 0).any():
            raise LoadError(f"{name} has negative numbers.")
    if not 1 <= load.experts_per_token <= experts:
        raise LoadError(f"{load.experts_per_token} experts per token cannot be chosen of {experts}.")
    if load.num_ranks < 1 or (load.rank_of >= load.num_ranks).any():
        raise LoadError(f"An expert stands on rank {load.rank_of.max()} of only {load.num_ranks}.")
    if load.is_balanced and load.num_ranks > 1:
        raise LoadError("Where the engine moves experts between its ranks, no ranks can be named.")
    _check_pairs(load)


def _check_pairs(load: ExpertLoad) -> None:
    if not np.array_equal(load.pairs, load.pairs.transpose(0, 2, 1)):
        raise LoadError("Experts chosen together must be counted alike in both orders.")
    if not np.array_equal(np.einsum("lee->le", load.pairs), load.tokens):
        raise LoadError("The diagonal of the pairs must be the tokens of each expert.")
    if not np.array_equal(load.pairs.sum(axis=2), load.tokens * load.experts_per_token):
        raise LoadError(f"Each token chose {load.experts_per_token} experts, but the pairs do not add up to that.")
