"""The manifest of a prepared model: size and sha256 of every file, and what it was made from.

It is written last, so a folder with a valid manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import ModelDamaged
from cluster.home import sync_folder

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class FileRecord:
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`recipe` is raised when the conversion changes, so that what an older one made is made anew."""

    model: str
    format: str
    recipe: int
    source_sha256: str
    licence: str
    upstream: str
    files: Mapping[str, FileRecord]

    def write(self, folder: Path) -> None:
        content = json.dumps(asdict(self), indent=2) + "\n"
        with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a prepared folder; none where there is none that can be understood."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        return Manifest(files=files, **content)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
        return None


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Sum up and make durable every file below `folder`."""
    records = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        records[path.relative_to(folder).as_posix()] = FileRecord(path.stat().st_size, sha256_of(path))
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)
    return records


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise `ModelDamaged` naming the first file that is not what the manifest says."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ModelDamaged(f"{path} is missing.")
        if (size := path.stat().st_size) != record.num_bytes:
            raise ModelDamaged(f"{path} has {size} bytes instead of {record.num_bytes}.")
        if sha256_of(path) != record.sha256:
            raise ModelDamaged(f"{path} does not match its sha256.")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
