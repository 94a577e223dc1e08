"""`python -m cluster.weights prepare [names]`: get models ready before anything starts, with a progress bar.

`python -m cluster.weights upcycle PARENT FOLDER` makes a Mixtral checkpoint from a dense one; `wide-twin` makes a dense
checkpoint of the same total size, `sliding-window` a Mistral whose attention sees so many tokens back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.catalogue import CATALOGUE, Format, resolve
from cluster.errors import ClusterError, ModelNotFound
from cluster.home import Home, open_home
from cluster.weights.dense_twins import sliding_window_twin, wide_twin
from cluster.weights.prepare import prepare
from cluster.weights.upcycle import MixtureRecipe, upcycle

DEFAULT_TARGETS = ("tiny/gguf", "embed/gguf")
"""What a machine without a GPU needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.weights", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="convert, verify and keep models in the data folder")
    command.add_argument(
        "names", nargs="*", help=f"NAME or NAME/FORMAT, or 'all' (default: {' '.join(DEFAULT_TARGETS)})"
    )
    command.add_argument("--home", type=Path, help="data folder (default: WINDFARM_HOME)")
    command.set_defaults(run=_run_prepare)
    _add_upcycle(commands.add_parser("upcycle", help="make a mixture of experts from a dense checkpoint"))
    _add_wide_twin(commands.add_parser("wide-twin", help="make a dense checkpoint as large as such a mixture"))
    _add_sliding_window(commands.add_parser("sliding-window", help="make a Mistral with sliding-window attention"))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ClusterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _run_prepare(options: argparse.Namespace) -> None:
    targets = parse_targets(options.names)
    prepare_all(targets, open_home(options.home))


def _add_upcycle(command: argparse.ArgumentParser) -> None:
    defaults = MixtureRecipe()
    _add_folders(command)
    command.add_argument("--experts", type=int, default=defaults.num_experts)
    command.add_argument("--per-token", type=int, default=defaults.experts_per_token)
    command.add_argument("--variant", choices=("identical", "distinct"), default=defaults.variant)
    command.add_argument("--seed", type=int, default=0, help="of the router and of the distinct experts' noise")
    command.add_argument("--noise", type=float, default=defaults.noise, help="of distinct experts, relative")
    command.add_argument("--router-skew", type=float, default=0.0, help="above 0 a few experts win most tokens")
    _add_ranks(command)
    command.set_defaults(run=_run_upcycle)


def _add_wide_twin(command: argparse.ArgumentParser) -> None:
    _add_folders(command)
    command.add_argument("--blocks", type=int, default=8, help="feed-forward blocks side by side (default %(default)s)")
    _add_ranks(command)
    command.set_defaults(run=_run_wide_twin)


def _add_sliding_window(command: argparse.ArgumentParser) -> None:
    _add_folders(command)
    command.add_argument("--window", type=int, required=True, help="tokens that attention sees back")
    command.set_defaults(run=_run_sliding_window)


def _add_folders(command: argparse.ArgumentParser) -> None:
    command.add_argument("parent", type=Path, help="folder of a dense Llama or Mistral checkpoint")
    command.add_argument("folder", type=Path, help="where to write the new checkpoint; must not exist yet")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")


def _add_ranks(command: argparse.ArgumentParser) -> None:
    counts = MixtureRecipe().rank_counts
    command.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=counts,
        help=f"rank counts that divide the heads (default {counts})",
    )


def _run_upcycle(options: argparse.Namespace) -> None:
    recipe = MixtureRecipe(
        num_experts=options.experts,
        experts_per_token=options.per_token,
        variant=options.variant,
        router_seed=options.seed,
        noise_seed=options.seed,
        noise=options.noise,
        router_skew=options.router_skew,
        rank_counts=tuple(options.ranks),
        dtype=options.dtype,
    )
    console = Console(stderr=True)
    columns = (TextColumn("layers"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        upcycle(
            options.parent, options.folder, recipe, lambda done, total: bar.update(task, completed=done, total=total)
        )


def _run_wide_twin(options: argparse.Namespace) -> None:
    wide_twin(options.parent, options.folder, options.blocks, rank_counts=tuple(options.ranks), dtype=options.dtype)


def _run_sliding_window(options: argparse.Namespace) -> None:
    sliding_window_twin(options.parent, options.folder, options.window, dtype=options.dtype)


def parse_targets(names: Sequence[str]) -> list[tuple[str, Format]]:
    """Pairs of source and format; a name without a format means its first one."""
    if list(names) == ["all"]:
        return [(entry.name, model_format) for entry in CATALOGUE.values() for model_format in entry.formats]
    return [_parse_target(name) for name in names or DEFAULT_TARGETS]


def prepare_all(targets: Sequence[tuple[str, Format]], home: Home) -> None:
    """Prepare one after the other: a bar each on a terminal, quiet elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.fields[target]:<12}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for source, model_format in targets:
            task = progress.add_task("", total=1.0, target=f"{source}/{model_format}")

            def report(step: str, fraction: float) -> None:
                progress.update(task, description=step, completed=fraction)  # noqa: B023 - called before the next turn

            prepare(source, model_format, home, report)
            progress.stop_task(task)


def _parse_target(text: str) -> tuple[str, Format]:
    name, _, model_format = text.rpartition("/")
    if name in CATALOGUE:
        if model_format not in CATALOGUE[name].formats:
            known = " or ".join(CATALOGUE[name].formats)
            raise ModelNotFound(f"{name!r} cannot be had as {model_format!r}, only as {known}.")
        return name, "gguf" if model_format == "gguf" else "hf"
    resolved = resolve(text)
    if not resolved.formats:
        raise ModelNotFound(f"{text} is a remote API: there are no files to prepare.")
    return text, resolved.formats[0]


if __name__ == "__main__":
    sys.exit(main())
