"""The files that documents were made of, one per document version, kept as long as the version is.

Shown pages and downloads come from here; everything else rests on the parsed text in the database. Calls block.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path


class Originals:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, version_id: str, source: Path) -> None:
        """A second name for `source`, which nobody changes in place; a copy where the disk is another one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{version_id}.part"
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
        os.replace(part, self.folder / version_id)

    def path(self, version_id: str) -> Path | None:
        """None for versions that came before originals were kept, or without a file."""
        path = self.folder / version_id
        return path if path.is_file() else None

    def remove(self, version_ids: Iterable[str]) -> None:
        for version_id in version_ids:
            (self.folder / version_id).unlink(missing_ok=True)

    def remove_all_but(self, version_ids: Collection[str]) -> int:
        """Delete files of versions that are gone. Returns how many there were."""
        if not self.folder.is_dir():
            return 0
        strays = [file for file in self.folder.iterdir() if file.name not in version_ids]
        for file in strays:
            with contextlib.suppress(IsADirectoryError):
                file.unlink(missing_ok=True)
        return len(strays)
