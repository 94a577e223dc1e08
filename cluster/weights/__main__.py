"""`python -m cluster.weights prepare [names]`: get models ready before anything starts, with a progress bar.

`python -m cluster.weights upcycle PARENT FOLDER` makes a Mixtral checkpoint from a dense one.
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
    command.add_argument("parent", type=Path, help="folder of a dense Llama or Mistral checkpoint")
    command.add_argument("folder", type=Path, help="where to write the Mixtral checkpoint; must not exist yet")
    command.add_argument("--experts", type=int, default=defaults.num_experts)
    command.add_argument("--per-token", type=int, default=defaults.experts_per_token)
    command.add_argument("--variant", choices=("identical", "distinct"), default=defaults.variant)
    command.add_argument("--seed", type=int, default=0, help="of the router and of the distinct experts' noise")
    command.add_argument("--router-skew", type=float, default=0.0, help="above 0 a few experts win most tokens")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default=defaults.dtype)
    command.set_defaults(run=_run_upcycle)


def _run_upcycle(options: argparse.Namespace) -> None:
    recipe = MixtureRecipe(
        num_experts=options.experts,
        experts_per_token=options.per_token,
        variant=options.variant,
        router_seed=options.seed,
        noise_seed=options.seed,
        router_skew=options.router_skew,
        dtype=options.dtype,
    )
    console = Console(stderr=True)
    with Progress(TextColumn("layers"), BarColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=None)
        upcycle(
            options.parent, options.folder, recipe, lambda done, total: bar.update(task, completed=done, total=total)
        )


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
