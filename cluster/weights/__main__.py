"""`python -m cluster.weights prepare [names]`: get models ready before anything starts, with a progress bar."""

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
    options = parser.parse_args(arguments)
    try:
        targets = parse_targets(options.names)
        prepare_all(targets, open_home(options.home))
    except ClusterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


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
