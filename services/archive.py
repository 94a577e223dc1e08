"""One file that holds many, each with its checksum: what exports and backups are written into and read from.

A zip archive with a manifest. Nothing of it is used before everything in it has been proved whole. Calls block.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from services.errors import ApiError, invalid

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_BLOCK = 1 << 20
# Text and JSON shrink to a third; vectors and most originals do not shrink.
_PACKED = (".json", ".txt", ".sqlite")
_MAX_MEMBERS = 10_000_000


class ArchiveWriter:
    """Use as a context manager; the archive is whole when the block ends without an error."""

    def __init__(self, path: Path, kind: str) -> None:
        self._kind = kind
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._files: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        """Goes into the manifest."""

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            manifest = {"format": self._kind, "version": FORMAT_VERSION, **self.facts, "files": self._files}
            data = json.dumps(manifest, ensure_ascii=False).encode()
            self._zip.comment = hashlib.sha256(data).hexdigest().encode()
            self._zip.writestr(MANIFEST, data, zipfile.ZIP_DEFLATED)
        self._zip.close()

    def add_json(self, name: str, value: Any) -> None:
        self.add_bytes(name, json.dumps(value, ensure_ascii=False).encode())

    def add_bytes(self, name: str, data: bytes) -> None:
        with self._member(name) as (target, digest):
            target.write(data)
            digest.update(data)

    def add_vectors(self, name: str, vectors: npt.NDArray[np.float32]) -> None:
        """Shape (n, dimension)."""
        self.add_bytes(name, np.ascontiguousarray(vectors, dtype="<f4").tobytes())

    def add_file(self, name: str, path: Path) -> None:
        with path.open("rb") as source, self._member(name) as (target, digest):
            while block := source.read(_BLOCK):
                target.write(block)
                digest.update(block)

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], Any]]:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED if name.endswith(_PACKED) else zipfile.ZIP_STORED
        digest = hashlib.sha256()
        with self._zip.open(info, "w", force_zip64=True) as target:
            yield target, digest
        self._files[name] = {"sha256": digest.hexdigest(), "num_bytes": self._zip.getinfo(name).file_size}


class ArchiveReader:
    """Use as a context manager. Opening reads everything once: a damaged or foreign file is refused here."""

    def __init__(self, path: Path, kind: str) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise _damaged(f"it is no archive ({error})") from error
        try:
            self.manifest = self._read_manifest(kind)
            self._files: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
            self._prove()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def names(self, start: str = "") -> list[str]:
        return [name for name in self._files if name.startswith(start)]

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> bytes:
        if name not in self._files:
            raise _damaged(f"{name} is missing")
        return self._zip.read(name)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise _damaged(f"{name} is no JSON") from error

    def read_vectors(self, name: str, dimension: int) -> npt.NDArray[np.float32]:
        """Shape (n, dimension)."""
        data = self.read(name)
        if dimension < 1 or len(data) % (4 * dimension):
            raise _damaged(f"{name} holds no vectors of dimension {dimension}")
        return np.frombuffer(data, dtype="<f4").reshape(-1, dimension).astype(np.float32)

    def copy(self, name: str, target: Path) -> None:
        if name not in self._files:
            raise _damaged(f"{name} is missing")
        with self._zip.open(name) as source, target.open("wb") as file:
            while block := source.read(_BLOCK):
                file.write(block)

    def _read_manifest(self, kind: str) -> dict[str, Any]:
        try:
            data = self._zip.read(MANIFEST)
            manifest = json.loads(data)
        except (KeyError, ValueError, RecursionError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
            raise _damaged("its manifest is missing or damaged") from error
        if hashlib.sha256(data).hexdigest().encode() != self._zip.comment or not isinstance(manifest, dict):
            raise _damaged("its manifest was changed")
        if manifest.get("format") != kind:
            raise invalid(
                f"This file is a {str(manifest.get('format'))[:60]!r}, but a {kind!r} is expected.",
                param="file",
                code="wrong_archive",
            )
        if manifest.get("version") != FORMAT_VERSION:
            raise invalid(
                f"This file has format {str(manifest.get('version'))[:20]}, but this windfarm reads {FORMAT_VERSION}. "
                "Use the windfarm that wrote it, or a newer one.",
                param="file",
                code="wrong_archive",
            )
        return manifest

    def _prove(self) -> None:
        present = set(self._zip.namelist()) - {MANIFEST}
        if present != set(self._files) or len(present) > _MAX_MEMBERS:
            raise _damaged("its files are not those of its manifest")
        for name, expected in self._files.items():
            digest = hashlib.sha256()
            num_bytes = 0
            try:
                with self._zip.open(name) as source:
                    while block := source.read(_BLOCK):
                        digest.update(block)
                        num_bytes += len(block)
                        if num_bytes > expected["num_bytes"]:
                            break
            except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
                raise _damaged(f"{name} cannot be read ({error})") from error
            if (digest.hexdigest(), num_bytes) != (expected["sha256"], expected["num_bytes"]):
                raise _damaged(f"{name} does not have its checksum")


def _damaged(why: str) -> ApiError:
    return invalid(
        f"The file is damaged: {why}. Nothing was changed. Write it again, or take another copy.",
        param="file",
        code="damaged_archive",
    )
