"""Opens what belongs to one data folder: database, vector store, journal and blobs.

Opening migrates the database, waits for the vector store's folder (a predecessor may still hold it), refuses an empty
folder where the database knows passages, and brings both to agreement.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import select

from rag.errors import StoreMissing
from rag.read_write_lock import ReadWriteLock
from rag.vector_store import ServerSettings, VectorStore, open_vector_store
from services.backup import sweep_temporary
from services.blobs import Blobs
from services.config import Environment, StoreConfig
from services.database import Collection, Database, Document, Version
from services.errors import invalid
from services.journal import Journal
from services.receipts import Deletions
from services.reconciler import ReconcileReport, reconcile
from services.schema import upgrade

_log = logging.getLogger(__name__)

REBUILD_FILE = "REBUILD"
_LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class StoreParts:
    """What belongs to one opened data folder."""

    config: StoreConfig
    database: Database
    vectors: VectorStore
    visible: ReadWriteLock
    journal: Journal
    blobs: Blobs
    report: ReconcileReport
    home: Path


def open_store(config: StoreConfig, environment: Environment) -> StoreParts:
    """Blocks. Raises `StartRefused`, `StoreLocked` or `StoreMissing` with the next step."""
    upgrade(environment.database_url)
    database = Database(environment.database_url)
    folder = environment.home / "qdrant"
    config = _with_server(config, environment)
    url = config.qdrant.url
    if url is None:
        _refuse_lost_folder(database, folder)
    settings = ServerSettings(config.qdrant.shards, config.qdrant.replication_factor, config.qdrant.quantization)
    vectors = open_vector_store(
        folder,
        url=url,
        nodes=config.qdrant.nodes,
        api_key=_api_key(config),
        lock_timeout_s=_LOCK_TIMEOUT_S,
        settings=settings,
    )
    visible = ReadWriteLock()
    blobs = Blobs(environment.home / "blobs", environment.home)
    journal = Journal(database, vectors, visible, blobs.originals)
    report = reconcile(database, vectors, journal, blobs, owns_all=url is None)
    Deletions(database, vectors, journal, blobs).finish_interrupted()
    sweep_temporary(environment.home)
    _log.info("Database and vector store agree: %s", asdict(report))
    return StoreParts(config, database, vectors, visible, journal, blobs, report, environment.home)


def _refuse_lost_folder(database: Database, folder: Path) -> None:
    """A vanished vector store must not look like an empty knowledge base."""
    with_passages = (
        select(Collection.name)
        .join(Document, Document.collection_id == Collection.id)
        .join(Version, Version.id == Document.active_version_id)
        .where(Collection.deleted_at.is_(None), Document.deleted_at.is_(None), Version.num_chunks > 0)
        .limit(1)
    )
    with database.read() as session:
        name = session.scalars(with_passages).first()
    rebuild = folder / REBUILD_FILE
    if name is None or (folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())):
        rebuild.unlink(missing_ok=True)
        return
    if rebuild.exists():
        return
    raise StoreMissing(
        f"The vector store in {folder} is gone, but the database knows documents (such as those of the collection "
        f"{name!r}). Restore that folder from a backup. To make all vectors anew from the stored texts instead, create "
        f"an empty file {rebuild} and start again."
    )


def _with_server(config: StoreConfig, environment: Environment) -> StoreConfig:
    """The environment's Qdrant server wins over the file's."""
    if environment.qdrant_url is None:
        return config
    qdrant = config.qdrant.model_copy(update={"url": environment.qdrant_url})
    return config.model_copy(update={"qdrant": qdrant})


def _api_key(config: StoreConfig) -> str | None:
    name = config.qdrant.api_key_env
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise invalid(f"qdrant.api_key_env names the variable {name}, which is not set. Set it before `windfarm up`.")
    return key
