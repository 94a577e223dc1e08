"""A folder of this machine as a source. Links that lead out of it are refused, whatever they point to."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from rag.filenames import name_of_path
from services.sync.connector import ConnectorError, Content, Item, Listing, Skipped
from services.sync.ignore import FILE_NAME, Ignore

_Stamp = tuple[int, int, int]
"""Inode, size and time of change in nanoseconds: while they stay, the content is not read again."""


class FolderConnector:
    """See `Connector`. Hidden files, and what the patterns name, are left out."""

    interval_s = 2.0

    def __init__(self, folder: Path, patterns: Sequence[str] = ()) -> None:
        self._folder = folder.resolve()
        self._patterns = patterns
        self._hashes: dict[str, tuple[_Stamp, str]] = {}
        self.source = f"folder:{socket.gethostname()}:{self._folder}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def list_items(self) -> Listing:
        if not self._folder.is_dir():
            raise ConnectorError(f"There is no folder {self._folder}. Check that it is mounted.")
        ignore = Ignore([*self._ignore_file(), *self._patterns])
        items: list[Item] = []
        skipped: list[Skipped] = []
        for path, relative in self._walk(ignore, skipped):
            items.append(self._item(path, relative))
        return Listing(items, skipped)

    def content(self, item: Item) -> Content:
        path = self._folder / item.origin.removeprefix(f"{self._folder}/")
        # A link may have taken the file's place since it was listed.
        if not path.resolve().is_relative_to(self._folder):
            raise ConnectorError(f"{path} leads out of {self._folder}.")
        return Content(path)

    def _ignore_file(self) -> list[str]:
        file = self._folder / FILE_NAME
        return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []

    def _walk(self, ignore: Ignore, skipped: list[Skipped]) -> Iterator[tuple[Path, PurePosixPath]]:
        """Files in order; links to folders are not followed, so that nothing is found twice and no walk is endless."""
        for root, folders, files in os.walk(self._folder, onerror=_raise):
            at = Path(root).relative_to(self._folder)
            kept = []
            for name in sorted(folders):
                relative = PurePosixPath(at, name)
                if name.startswith(".") or ignore.matches(relative, is_folder=True):
                    continue
                if (self._folder / relative).is_symlink():
                    skipped.append(Skipped(str(relative), "It is a link to a folder; those are not followed."))
                else:
                    kept.append(name)
            folders[:] = kept
            for name in sorted(files):
                relative = PurePosixPath(at, name)
                if name.startswith(".") or ignore.matches(relative, is_folder=False):
                    continue
                path = self._folder / relative
                if why := self._why_not(path):
                    skipped.append(Skipped(str(relative), why))
                else:
                    yield path, relative

    def _why_not(self, path: Path) -> str | None:
        target = path.resolve()
        if path.is_symlink() and not target.is_relative_to(self._folder):
            return "It is a link that leads out of the folder."
        return None if target.is_file() else "It is no file."

    def _item(self, path: Path, relative: PurePosixPath) -> Item:
        name = name_of_path(relative.parts)
        try:
            stamp = _stamp(path)
            known = self._hashes.get(str(relative))
            if known is None or known[0] != stamp:
                with path.open("rb") as file:
                    known = self._hashes[str(relative)] = (stamp, hashlib.file_digest(file, "sha256").hexdigest())
            return Item(name, str(path), stamp[1], known[1])
        except OSError:
            # Not to be readable is not to be gone: sending it will say why.
            return Item(name, str(path))


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _raise(error: OSError) -> None:
    raise ConnectorError(f"{error.filename} cannot be read: {error.strerror}. Leave it out, or let it be read.")
