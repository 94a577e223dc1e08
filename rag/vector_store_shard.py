"""One collection's engine: a shard folder of `qdrant-edge-py`, and how it is kept quick without standing still.

Merging segments and building the graph takes seconds for 10,000 passages, and the engine holds Python's interpreter
lock meanwhile. So a large shard is merged in another process, on a copy; searches and writes go on, what was written is
repeated on the copy, and then the copy takes the folder's place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import qdrant_edge as qe

from rag.access import TENANT
from rag.errors import StoreError
from rag.read_write_lock import ReadWriteLock
from rag.vector_store import DENSE, INDEXED_KEYWORDS, SPARSE

_NEW, _DELETED, _COPY, _READY = ".new-", ".deleted-", ".copy-", ".ready-"
_SMALL = 2000
"""Points of a shard that is merged in a moment, where it is."""
_LOOSE_SHARE, _MOST_LOOSE = 0.1, 5000
"""Points that may lie outside of the graph before it is worth building it anew: a search compares all of them."""
_MOST_REPEATED = 20_000
"""Points that are kept to be written once more while a copy is merged."""
_RESERVE_BYTES = 8 << 20
_SOURCE_ROOT = Path(__file__).resolve().parent.parent
_INDEXES: dict[str, Any] = {
    **dict.fromkeys(INDEXED_KEYWORDS, qe.PayloadSchemaType.Keyword),
    TENANT: qe.KeywordIndexParams(is_tenant=True),
}

T = TypeVar("T")


class Shard:
    """`visibility` is held alone while a version takes another's place, so that no search sees both or neither; `use`
    keeps the engine from being closed under a running call."""

    def __init__(self, folder: Path, edge: qe.EdgeShard, dimension: int) -> None:
        self._folder = folder
        self._edge: qe.EdgeShard | None = edge
        self._alive = ReadWriteLock()
        self._writing = threading.RLock()
        self._merging = threading.Lock()
        self._merger: subprocess.Popen[bytes] | None = None
        self._is_closing = False
        self._since_copy: list[qe.UpdateOperation] | None = None
        self._num_repeated = 0
        self._num_loose = _num_unindexed(edge)
        self.dimension = dimension
        self.visibility = ReadWriteLock()

    @classmethod
    def create(cls, root: Path, name: str, dimension: int) -> Shard:
        fresh = root / f"{_NEW}{name}"
        with as_store_error(f"make the collection {name!r}"):
            edge = qe.EdgeShard.create(str(fresh), _config(dimension))
            for field, kind in _INDEXES.items():
                edge.update(qe.UpdateOperation.create_field_index(field, kind))
            edge.flush()
            edge.close()
            os.rename(fresh, root / name)
        return cls.load(root / name)

    @classmethod
    def load(cls, folder: Path) -> Shard:
        with as_store_error(f"open the collection in {folder}"):
            edge = qe.EdgeShard.load(str(folder))
            # A shard of an earlier version lacks the fields of access.
            for field in _INDEXES.keys() - edge.info().payload_schema.keys():
                edge.update(qe.UpdateOperation.create_field_index(field, _INDEXES[field]))
            return cls(folder, edge, _stored_dimension(folder))

    def use(self, call: Callable[[qe.EdgeShard], T]) -> T:
        with self._alive.shared():
            if self._edge is None:
                raise StoreError("The collection was deleted or the store closed meanwhile.")
            with as_store_error("work on a collection"):
                return call(self._edge)

    def update(self, operation: qe.UpdateOperation, num_points: int = 0) -> None:
        """`num_points`: how many it writes or removes."""
        with self._writing:
            self.use(lambda edge: edge.update(operation))
            self._num_loose += num_points
            if self._since_copy is not None:
                self._since_copy.append(operation)
                self._num_repeated += num_points

    def optimize(self) -> bool:
        """Merge and index what was written since, if it is enough to be felt. True if there was work."""
        if not self._merging.acquire(blocking=False):
            return False
        try:
            num_points = self.use(lambda edge: int(edge.info().points_count))
            if num_points <= _SMALL:
                return self._merge_here()
            if self._num_loose < min(_MOST_LOOSE, _LOOSE_SHARE * num_points):
                return False
            return self._merge_copy()
        finally:
            self._merging.release()

    def close(self) -> None:
        self._is_closing = True
        if (merger := self._merger) is not None:
            merger.kill()
        with self._merging, self._writing, self._alive.exclusive():
            if self._edge is not None:
                self._edge.flush()
                self._edge.close()
                self._edge = None

    def remove(self) -> None:
        """Close it and remove its folder."""
        self.close()
        # Renaming is one step: after a kill the collection is there or not, never half of it.
        doomed = _beside(self._folder, _DELETED)
        os.rename(self._folder, doomed)
        shutil.rmtree(doomed)

    def _merge_here(self) -> bool:
        with self._writing:
            self._num_loose = 0
            return self.use(lambda edge: bool(edge.optimize()))

    def _merge_copy(self) -> bool:
        copy = _beside(self._folder, _COPY)
        try:
            num_loose = self._begin_copy(copy)
            return self._run_merger(copy) and self._adopt(copy, num_loose)
        finally:
            with self._writing:
                self._since_copy = None
            shutil.rmtree(copy, ignore_errors=True)

    def _begin_copy(self, copy: Path) -> int:
        """Copy the folder as it is now; what is written from now on is remembered. Returns how much was loose."""
        with self._writing:
            self.use(lambda edge: edge.flush())
            files = [path.stat() for path in self._folder.rglob("*")]
            require_space(self._folder, 3 * sum(512 * each.st_blocks for each in files))
            shutil.rmtree(copy, ignore_errors=True)
            command = ["cp", "-r", "--sparse=always", "--reflink=auto", str(self._folder), str(copy)]
            if (copied := subprocess.run(command, capture_output=True, check=False)).returncode:
                raise StoreError(f"The collection could not be copied to be merged: {copied.stderr.decode()[:300]}")
            self._since_copy, self._num_repeated = [], 0
            return self._num_loose

    def _run_merger(self, copy: Path) -> bool:
        """True where it has merged something."""
        environment = {"PYTHONPATH": str(_SOURCE_ROOT), "PATH": os.defpath, "HOME": "/nonexistent"}
        command = [sys.executable, "-m", "rag.vector_store_merger", str(copy)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd="/") as merger:
            self._merger = merger
            if self._is_closing:
                merger.kill()
            answer, _ = merger.communicate()
        self._merger = None
        if self._is_closing:
            return False
        if merger.returncode:
            raise StoreError(f"Merging a collection ended with status {merger.returncode}; its output says why.")
        return answer.strip() == b"merged"

    def _adopt(self, copy: Path, num_loose: int) -> bool:
        """Bring the copy up to date and put it in the folder's place. False where too much was written meanwhile."""
        with self._writing:
            changes = self._since_copy
            if changes is None or self._num_repeated > _MOST_REPEATED or self._is_closing:
                return False
            with as_store_error("take over a merged collection"):
                fresh = qe.EdgeShard.load(str(copy))
                for operation in changes:
                    fresh.update(operation)
                fresh.flush()
                fresh.close()
                with self._alive.exclusive():
                    self._swap(copy)
            self._num_loose -= num_loose
            return True

    def _swap(self, copy: Path) -> None:
        """`sweep` ends what a kill interrupts here: there is always one whole folder."""
        assert self._edge is not None, "not closed while it is merged"
        ready, former = _beside(self._folder, _READY), _beside(self._folder, _DELETED)
        self._edge.flush()
        self._edge.close()
        os.rename(copy, ready)
        os.rename(self._folder, former)
        os.rename(ready, self._folder)
        self._edge = qe.EdgeShard.load(str(self._folder))
        shutil.rmtree(former)


def sweep(root: Path) -> None:
    """Put right what a kill left half made, half deleted or half swapped."""
    for entry in root.iterdir():
        name = entry.name.removeprefix(_READY)
        if name != entry.name and not (root / name).exists():
            os.rename(entry, root / name)
        elif entry.name.startswith((_NEW, _DELETED, _COPY, _READY)):
            shutil.rmtree(entry)


def require_space(folder: Path, num_bytes: int) -> None:
    """The engine writes through memory maps of sparse files: on a full disk that does not fail, it kills the process
    (SIGBUS). So there must be room before it begins, also for the small changes that follow."""
    if shutil.disk_usage(folder).free < num_bytes + _RESERVE_BYTES:
        raise OSError(errno.ENOSPC, "No space left for vectors", str(folder))


@contextmanager
def as_store_error(what: str) -> Iterator[None]:
    """The engine raises bare `Exception`; nothing else in these blocks does."""
    try:
        yield
    except (StoreError, OSError):
        raise
    except Exception as error:
        raise StoreError(f"The vector store could not {what}: {error}") from error


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{kind}{folder.name}")


def _config(dimension: int) -> qe.EdgeConfig:
    return qe.EdgeConfig(
        vectors={DENSE: qe.EdgeVectorParams(size=dimension, distance=qe.Distance.Cosine)},
        sparse_vectors={SPARSE: qe.EdgeSparseVectorParams(modifier=qe.Modifier.Idf)},
        quantization_config=qe.ScalarQuantizationConfig(type=qe.ScalarType.Int8, quantile=0.99),
        payload_memory=qe.Memory.Cached,
        wal_enabled=True,
    )


def _stored_dimension(folder: Path) -> int:
    config = json.loads((folder / "edge_config.json").read_text())
    return int(config["vectors"][DENSE]["size"])


def _num_unindexed(edge: qe.EdgeShard) -> int:
    """Points outside of the graph: the engine counts the indexed vectors of both kinds, and those of words always."""
    info = edge.info()
    return max(0, 2 * int(info.points_count) - int(info.indexed_vectors_count))
