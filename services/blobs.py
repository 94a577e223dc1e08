"""Uploaded files, kept until their job has ended. A file appears under its final name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from services.errors import ApiError, invalid
from services.originals import Originals

_PART = ".part"
SPACE_RESERVE_BYTES = 16 << 20


class Blobs:
    """Files of one folder, one per job. `home` is the data folder: what lies inside it is taken over by a link."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._folder = folder
        self._home = home
        self.originals = Originals(home / "originals")

    def keep(self, job_id: str, source: Path | bytes, max_bytes: int) -> Path:
        """A durable copy of `source`. Raises `ApiError` where it is too large or the disk full."""
        target = self._folder / job_id
        part = target.with_suffix(_PART)
        try:
            _check_size(source, max_bytes)
            self.require_space()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(source, part)
            os.replace(part, target)
            _sync_folder(self._folder)
        except OSError as error:
            # On a read-only disk there is nothing to clean up, and nothing that could.
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise _as_api_error(error, self._folder) from error
        return target

    def require_space(self) -> None:
        """Raise `OSError` (ENOSPC) while the disk is nearly full. The vector store maps its files into memory, and a
        mapped page that finds no place on the disk ends the whole process; so nothing is begun without a reserve."""
        if shutil.disk_usage(self._home).free < SPACE_RESERVE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._home))

    def place_for(self, job_id: str) -> Path:
        """Where the file of a job will lie that has yet to be fetched."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / job_id

    def remove(self, path: str | None) -> None:
        if path is not None:
            Path(path).unlink(missing_ok=True)

    def remove_all_but(self, wanted: Collection[str]) -> int:
        """Delete files that no job waits for. Returns how many there were."""
        if not self._folder.is_dir():
            return 0
        strays = [file for file in self._folder.iterdir() if file.is_file() and str(file) not in wanted]
        for file in strays:
            file.unlink(missing_ok=True)
        return len(strays)

    def _write(self, source: Path | bytes, part: Path) -> None:
        part.unlink(missing_ok=True)
        if isinstance(source, Path) and self._is_ours(source):
            os.link(source, part)
        elif isinstance(source, Path):
            shutil.copyfile(source, part)
        else:
            part.write_bytes(source)
        with part.open("rb") as file:
            os.fsync(file.fileno())

    def _is_ours(self, source: Path) -> bool:
        """Inside the data folder nobody changes a file in place, so a second name for it is as good as a copy."""
        resolved = source.resolve()
        return (
            resolved.is_relative_to(self._home.resolve()) and os.stat(resolved).st_dev == os.stat(self._folder).st_dev
        )


def _check_size(source: Path | bytes, max_bytes: int) -> None:
    num_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
    if num_bytes > max_bytes:
        raise ApiError(
            413,
            "invalid_request_error",
            "too_large",
            f"The file has {num_bytes / (1 << 20):.1f} MiB; at most {max_bytes / (1 << 20):g} MiB are taken. "
            "Split it or raise ingestion.max_file_mib.",
            "file",
        )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _as_api_error(error: OSError, folder: Path) -> ApiError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"The disk of {folder} is full; nothing was stored. Free some space and upload the file again."
        return ApiError(507, "insufficient_storage", "disk_full", message)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        message = f"The data folder {folder} cannot be written ({error.strerror}); nothing was stored."
        return ApiError(507, "insufficient_storage", "read_only", message)
    if isinstance(error, FileNotFoundError):
        return invalid(f"There is no file {error.filename}.", param="file", code="file_not_found")
    return ApiError(500, "server_error", "storage_failed", f"The file could not be stored: {error}.")
