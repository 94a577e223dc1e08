"""The code that a windfarm runs: a copy of our sources for each version, in a folder named by their hash.

All processes import from a copy, so `git pull` or an edit changes nothing until `windfarm apply` (or the next `up`):
a replica that Serve starts meanwhile is of the same code as the others, also in what it imports late. A copy is never
changed. Not part of it, and so no reason to replace a replica: tests, set-up, documents and `ray_config.yaml`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGES = ("cluster", "rag", "services", "ui")
REPOSITORY = Path(__file__).resolve().parents[1]
NUM_DIGITS = 16
_BYTECODE = "__pycache__"


@dataclass(frozen=True)
class Sources:
    """What the four packages held at one moment: `files` has contents by path below `root`."""

    root: Path
    files: Mapping[str, bytes]

    @cached_property
    def version(self) -> str:
        """Hash of names and contents."""
        state = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            state.update(f"{len(name)} {len(content)} {name}".encode() + content)
        return state.hexdigest()[:NUM_DIGITS]


def read_sources(root: Path = REPOSITORY) -> Sources:
    """All files of the four packages but hidden ones, which editors leave, and compiled ones, which follow from others.

    Files beside the modules (styles, scripts, templates) are read by the modules, so they are code as well.
    """
    return Sources(root, {path.relative_to(root).as_posix(): path.read_bytes() for path in _files(root)})


def keep_copy(sources: Sources, run: Path) -> Path:
    """The folder to import this code from; made where there is none yet. `run` is that of the data folder."""
    folder = copies(run) / sources.version
    if folder.is_dir():
        return folder
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for name, content in sources.files.items():
            target = draft / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            _take_time_and_bytecode(sources.root / name, target)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def remove_other_copies(run: Path, kept: Collection[str]) -> None:
    """Remove what no process imports from any more. `kept` are versions."""
    for folder in copies(run).glob("*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def copies(run: Path) -> Path:
    return run / "code"


def _files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for folder, folders, names in os.walk(root / package):
            folders[:] = [name for name in folders if name != _BYTECODE and not name.startswith(".")]
            yield from (Path(folder, name) for name in names if not name.startswith(".") and not name.endswith("~"))


def _take_time_and_bytecode(source: Path, target: Path) -> None:
    """Bytecode counts for a source of one size and time of change; without it each start would compile everything."""
    compiled = source.with_name(_BYTECODE) / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
    # Edited or removed since it was read: then bytecode of the other text must not be taken for this one's.
    with contextlib.suppress(FileNotFoundError):
        if source.suffix == ".py" and compiled.exists() and source.read_bytes() == target.read_bytes():
            target.with_name(_BYTECODE).mkdir(exist_ok=True)
            shutil.copy2(compiled, target.with_name(_BYTECODE) / compiled.name)
            times = source.stat()
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
