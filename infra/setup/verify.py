"""Run by the environment's Python: prints the pins of the given locks that are not wholly installed, one a line.

A killed pip leaves packages whose files are only partly there although pip takes them for installed. Every file that a
package's record names must exist with the recorded size.
"""

from __future__ import annotations

import csv
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path


def main(locks: list[str]) -> None:
    for lock in locks:
        for pin in incomplete(Path(lock)):
            sys.stdout.write(pin + "\n")


def incomplete(lock: Path) -> Iterator[str]:
    """Pins of a lock that this environment lacks or has with damaged files."""
    for name, version in pins(lock):
        if not is_whole(name, version):
            yield f"{name}=={version}"


def pins(lock: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of the lines that hold for this Python."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for line in lock.read_text().splitlines():
        pin, _, marker = line.partition(";")
        if "==" not in pin or (marker and f'"{here}"' not in marker):
            continue
        name, _, version = pin.strip().partition("==")
        yield name, version


def is_whole(name: str, version: str) -> bool:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    record = distribution.read_text("RECORD")
    if distribution.version != version or distribution.read_text("INSTALLER") is None or record is None:
        return False
    # Read here, because `distribution.files` leaves out missing files on newer Pythons. Compiled files come and go.
    lasting = (row for row in csv.reader(record.splitlines()) if row and not row[0].endswith(".pyc"))
    return all(has_size(Path(str(distribution.locate_file(row[0]))), row[2]) for row in lasting)


def has_size(path: Path, size: str) -> bool:
    try:
        return path.stat().st_size == int(size) if size else path.exists()
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
