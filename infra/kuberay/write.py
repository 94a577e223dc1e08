"""Writes the manifests again, each by the command that its first line names: `make manifests`."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from pathlib import Path

from infra.kuberay.check import FOLDER, ROOT

MARK = "# Written by: windfarm "


def main() -> None:
    for path in sorted(FOLDER.glob("*.yaml")):
        path.write_text(written_again(path), encoding="utf-8")
        print(path.relative_to(ROOT))


def command_of(path: Path) -> list[str]:
    """The arguments of `windfarm` that wrote this file."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    if not first.startswith(MARK):
        raise ValueError(f"{path} does not begin with {MARK!r}: nobody knows how it was written.")
    return shlex.split(first.removeprefix(MARK))


def written_again(path: Path) -> str:
    """What the file's command writes today, run where its paths lead somewhere."""
    from services.cli.commands import app

    output = io.StringIO()
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(output):
            app(command_of(path), standalone_mode=False)
    finally:
        os.chdir(before)
    return output.getvalue()


if __name__ == "__main__":
    main()
