"""The data folder: where models, vectors, documents, logs and the database of one windfarm lie.

The folder carries a version. Newer code upgrades it step by step under a lock; older code refuses it, because it would
damage what it does not understand. A folder that holds somebody else's files is never taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import HomeError

HOME_ENV = "WINDFARM_HOME"
VERSION_FILE = "version.json"
LOCK_FILE = ".lock"
FOLDERS = ("models", "qdrant", "blobs", "logs", "run")
DATABASE_FILE = "windfarm.db"
_PROBE_BYTES = 256 * 1024

_CAUSES = {
    errno.ENOSPC: ("the disk is full", "free some space, or name another folder with WINDFARM_HOME"),
    errno.EDQUOT: ("your disk quota is used up", "free some space, or name another folder with WINDFARM_HOME"),
    errno.EROFS: ("it lies on a read-only file system", "name a writable folder with WINDFARM_HOME"),
    errno.EACCES: ("you may not write there", "change its owner, or name another folder with WINDFARM_HOME"),
    errno.EPERM: ("you may not write there", "change its owner, or name another folder with WINDFARM_HOME"),
    errno.ENOTDIR: ("a part of the path is a file", "name a folder with WINDFARM_HOME"),
    errno.EEXIST: ("a file of that name is in the way", "move it away, or name another folder with WINDFARM_HOME"),
    errno.EIO: ("the disk reports an error", "check the disk, or name another folder with WINDFARM_HOME"),
}


@dataclass(frozen=True, slots=True)
class Home:
    """Paths of an opened data folder."""

    root: Path

    @property
    def models(self) -> Path:
        """Prepared and fetched models."""
        return self.root / "models"

    @property
    def qdrant(self) -> Path:
        """The embedded vector store; one process owns it."""
        return self.root / "qdrant"

    @property
    def blobs(self) -> Path:
        """Uploaded files, as they came."""
        return self.root / "blobs"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run(self) -> Path:
        """Process ids, addresses and sockets of a running windfarm."""
        return self.root / "run"

    @property
    def database(self) -> Path:
        """The SQLite file that is used where no other database is named."""
        return self.root / DATABASE_FILE


@dataclass(frozen=True, slots=True)
class Migration:
    """Brings a folder to `version`. Must be safe to run again: it is repeated when it was interrupted."""

    version: int
    title: str
    apply: Callable[[Home], None]


def _make_layout(home: Home) -> None:
    for name in FOLDERS:
        (home.root / name).mkdir(parents=True, exist_ok=True)


MIGRATIONS: tuple[Migration, ...] = (Migration(1, "first layout", _make_layout),)


def default_root() -> Path:
    """`WINDFARM_HOME`, otherwise `windfarm` in the user's data directory."""
    if named := os.environ.get(HOME_ENV):
        return Path(named).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser().absolute() / "windfarm"


def open_home(root: Path | None = None, *, migrations: Sequence[Migration] = MIGRATIONS) -> Home:
    """Create, upgrade or check the data folder. Raises `HomeError` when it cannot be used."""
    home = Home((root or default_root()).expanduser().absolute())
    with explain_disk_errors(home.root):
        home.root.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_folder(home)
        _check_writable(home)
        with _locked(home):
            _upgrade(home, migrations)
            _make_layout(home)
    return home


def read_version(home: Home) -> int:
    """Version of the folder's contents; 0 for a new folder."""
    path = home.root / VERSION_FILE
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["version"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError) as error:
        raise HomeError(
            f"{path} is damaged ({error}). Restore it from a backup, or name another folder with {HOME_ENV}."
        ) from error


def require_space(path: Path, num_bytes: int, purpose: str) -> None:
    """Raise `HomeError` when the disk of `path` has less than `num_bytes` left."""
    free = shutil.disk_usage(path).free
    if free < num_bytes:
        raise HomeError(
            f"{purpose} needs {_mib(num_bytes)} in {path}, but only {_mib(free)} are free: "
            f"free some space, or name another folder with {HOME_ENV}."
        )


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system below `path` into `HomeError` with cause and next step."""
    try:
        yield
    except OSError as error:
        cause, fix = _CAUSES.get(
            error.errno or 0, (error.strerror or str(error), f"name another folder with {HOME_ENV}")
        )
        raise HomeError(f"Cannot use the data folder {path}: {cause}. To go on: {fix}.") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole: after a crash it holds the old or the new content, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_foreign_folder(home: Home) -> None:
    if (home.root / VERSION_FILE).exists():
        return
    known = {*FOLDERS, LOCK_FILE, DATABASE_FILE}
    foreign = sorted(e.name for e in home.root.iterdir() if e.name not in known and not _is_our_draft(e.name))
    if foreign:
        raise HomeError(
            f"{home.root} is not a windfarm data folder: it has no {VERSION_FILE} but holds {', '.join(foreign[:3])}. "
            f"Name an empty or new folder with {HOME_ENV}."
        )


def _is_our_draft(name: str) -> bool:
    return name.startswith((".probe.", f".{VERSION_FILE}."))


def _check_writable(home: Home) -> None:
    # Only a real write tells: permissions mean nothing to root, and a full disk still lets an empty file be made.
    probe = home.root / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(FileNotFoundError, OSError):
            probe.unlink()


@contextlib.contextmanager
def _locked(home: Home) -> Iterator[None]:
    with (home.root / LOCK_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _upgrade(home: Home, migrations: Sequence[Migration]) -> None:
    newest = migrations[-1].version
    found = read_version(home)
    if found > newest:
        raise HomeError(
            f"The data folder {home.root} was written by a newer windfarm (folder version {found}, this code knows "
            f"{newest}). Update windfarm, or name another folder with {HOME_ENV}."
        )
    for migration in migrations:
        if migration.version > found:
            migration.apply(home)
            content = json.dumps({"version": migration.version, "title": migration.title})
            write_atomically(home.root / VERSION_FILE, content.encode())


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
