"""Backup and restore of everything that people put in, while windfarm serves.

A backup is of one moment: changes wait while the database is copied (SQLite's online backup), vectors are read and
files get second names; questions are answered meanwhile. A restore writes the vectors under new names beside the
present ones and then changes the database to the backup's in one transaction, so that every search sees the one or the
other whole.
Secrets: a backup holds conversations and the hashes of keys, not the keys. Calls block.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import make_url, select

from rag.read_write_lock import ReadWriteLock
from rag.types import StoredChunk
from rag.vector_store import Place, VectorStore, point_id
from services.archive import ArchiveReader, ArchiveWriter
from services.blobs import Blobs
from services.database import ApiKey, Collection, Database, Document, Job, StoredFile, User, Version, new_id, utc_now
from services.errors import conflict, forbidden
from services.journal import OUR_INDEX, Journal
from services.knowledge import ACTIVE_JOB_STATES
from services.reconciler import reconcile
from services.rights import OWNER, labels_of
from services.schema import upgrade

KIND = "windfarm-backup"
DATABASE = "database.sqlite"
_FILE_KINDS = ("originals", "files", "blobs")
Json = dict[str, Any]


class Backups:
    """`home` is the data folder."""

    def __init__(
        self,
        database: Database,
        store: VectorStore,
        journal: Journal,
        blobs: Blobs,
        visible: ReadWriteLock,
        home: Path,
        *,
        owns_all: bool,
    ) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._blobs = blobs
        self._visible = visible
        self._home = home
        self._owns_all = owns_all

    def write(self, actor: str, target: Path) -> Json:
        """Write everything into the file `target`. For the owner of the installation."""
        self._require_owner(actor)
        with TemporaryDirectory(dir=self._home, prefix="backup-") as folder, ArchiveWriter(target, KIND) as archive:
            copy = Path(folder) / DATABASE
            with self._journal.turn:
                self._journal.replay()
                copy_database(self._database_file(), copy)
                taken = Database(f"sqlite:///{copy}")
                try:
                    counts = _counts(taken) | {"num_passages": self._add_points(archive, taken)}
                    self._link_files(taken, Path(folder))
                finally:
                    taken.close()
            drop_free_pages(copy)
            for kind in _FILE_KINDS:
                for path in sorted((Path(folder) / kind).iterdir()):
                    archive.add_file(f"{kind}/{path.name}", path)
            archive.add_file(DATABASE, copy)
            archive.facts = {"made_at": utc_now().isoformat(), **counts}
        return {"object": "backup", "num_bytes": target.stat().st_size, **counts}

    def _add_points(self, archive: ArchiveWriter, taken: Database) -> int:
        num_passages = 0
        for index_id, dimension, versions in _indexes(taken):
            for version in versions:
                placed = self._store.vectors_of(index_id, version.id)
                if len(placed.places) != version.num_chunks:
                    continue  # A repair job of the backup writes it again from its text.
                archive.add_json(f"points/{version.id}.json", [asdict(place) for place in placed.places])
                archive.add_vectors(f"points/{version.id}.f32", placed.vectors.reshape(-1, dimension))
                num_passages += len(placed.places)
        return num_passages

    def _link_files(self, taken: Database, folder: Path) -> None:
        """A second name for every file that the database of the backup knows, so that a deletion cannot take it."""
        names = {"originals": _version_ids(taken), "files": _file_ids(taken), "blobs": _job_ids(taken)}
        for kind in _FILE_KINDS:
            (folder / kind).mkdir()
            for name in names[kind]:
                if (path := self._home / kind / name).is_file():
                    os.link(path, folder / kind / name)

    def restore(self, actor: str, source: Path) -> Json:
        """Put everything back to the state of a backup. What came since is gone; the key that asks stays valid."""
        self._require_owner(actor)
        self._database_file()
        with (
            ArchiveReader(source, KIND) as archive,
            TemporaryDirectory(dir=self._home, prefix="restore-") as folder,
        ):
            staged_file = Path(folder) / DATABASE
            archive.copy(DATABASE, staged_file)
            upgrade(f"sqlite:///{staged_file}")
            staged = Database(f"sqlite:///{staged_file}")
            new_indexes: list[str] = []
            try:
                self._keep_keys(staged, actor)
                new_indexes = self._stage_points(archive, staged)
                self._stage_files(archive, staged)
                staged.close()
                return self._swap(staged_file)
            except BaseException:
                staged.close()
                self._drop(set(new_indexes) - self._known_indexes())
                raise

    def _keep_keys(self, staged: Database, actor: str) -> None:
        """Whoever restores must be able to go on: their living keys come along, to the owner of the backup where the
        backup does not know them."""
        with self._database.read() as session:
            keys = session.scalars(select(ApiKey).where(ApiKey.user_id == actor, ApiKey.revoked_at.is_(None))).all()
        with staged.write() as session:
            owner = session.scalars(select(User.id).where(User.role == OWNER).order_by(User.created_at)).first()
            user_id = actor if session.get(User, actor) is not None else owner
            if user_id is None:
                raise conflict("The backup holds no owner, so nobody could use it.", code="backup_without_owner")
            for key in keys:
                if session.scalars(select(ApiKey).where(ApiKey.prefix == key.prefix)).first() is None:
                    values = {column.name: getattr(key, column.name) for column in ApiKey.__table__.columns}
                    session.add(ApiKey(**values | {"user_id": user_id}))

    def _stage_points(self, archive: ArchiveReader, staged: Database) -> list[str]:
        """Write all vectors under new index names and let the staged database use them. Returns the names."""
        new_indexes = []
        for index_id, dimension, versions in _indexes(staged):
            fresh = new_id("col")
            new_indexes.append(fresh)
            for version in versions:
                if not archive.has(f"points/{version.id}.json"):
                    continue
                with staged.read() as session:
                    document = session.get_one(Document, version.document_id)
                    labels = labels_of(session, document)
                chunks = _chunks(archive.read_json(f"points/{version.id}.json"), version, document, fresh)
                vectors = archive.read_vectors(f"points/{version.id}.f32", dimension)
                if chunks:
                    self._store.upsert(fresh, chunks, vectors, active=True, labels=labels)
            with staged.write() as session:
                for row in session.scalars(select(Collection).where(Collection.index_id == index_id)):
                    row.index_id = fresh
        return new_indexes

    def _stage_files(self, archive: ArchiveReader, staged: Database) -> None:
        """Files go by random ids, so those of the backup and the present ones do not meet."""
        for name in archive.names():
            kind, _, file = name.partition("/")
            if kind not in _FILE_KINDS or not file.replace("_", "").replace("-", "").isalnum():
                continue
            target = self._home / kind / file
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                archive.copy(name, part := target.with_suffix(".part"))
                os.replace(part, target)
        with staged.write() as session:
            for job in session.scalars(select(Job).where(Job.blob_path.is_not(None))):
                job.blob_path = str(self._home / "blobs" / job.id)

    def _swap(self, staged_file: Path) -> Json:
        with self._journal.turn:
            self._journal.replay()
            before = self._known_indexes()
            with self._visible.exclusive():
                copy_database(staged_file, self._database_file())
            self._drop(before - self._known_indexes())
            report = reconcile(self._database, self._store, self._journal, self._blobs, owns_all=self._owns_all)
        return {"object": "restore", **_counts(self._database), "reconciled": asdict(report)}

    def _drop(self, indexes: set[str]) -> None:
        for index_id in sorted(indexes):
            if index_id.startswith(OUR_INDEX):
                self._store.delete_collection(index_id)

    def _known_indexes(self) -> set[str]:
        with self._database.read() as session:
            return set(session.scalars(select(Collection.index_id)))

    def _require_owner(self, actor: str) -> None:
        with self._database.read() as session:
            user = session.get(User, actor)
        if user is None or user.role != OWNER:
            raise forbidden("A backup holds everybody's data: only the owner of this windfarm writes and restores it.")

    def _database_file(self) -> Path:
        url = make_url(str(self._database.engine.url))
        if url.get_backend_name() != "sqlite" or not url.database:
            raise conflict(
                "The database is on a PostgreSQL server, whose own tools copy it (pg_dump). For the documents alone "
                "there is `windfarm kb export`.",
                code="backup_unsupported",
            )
        return Path(url.database)


def sweep_temporary(home: Path) -> None:
    """Remove what a kill left of a backup, restore or import. Nothing of these runs yet."""
    for prefix in ("backup-", "restore-", "import-"):
        for folder in home.glob(f"{prefix}*"):
            if folder.is_dir():
                shutil.rmtree(folder)


def copy_database(source: Path, target: Path) -> None:
    """SQLite's online backup: a consistent copy of a database in use, or the other way round in one transaction."""
    with sqlite3.connect(source, timeout=60) as read, sqlite3.connect(target, timeout=60) as write:
        read.backup(write, pages=-1)
    read.close()
    write.close()


def drop_free_pages(path: Path) -> None:
    """Write a database anew from its rows. What was deleted stays in free pages until others need the space, and a copy
    that leaves this machine takes none of it along."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("VACUUM")


def _indexes(database: Database) -> Iterator[tuple[str, int, Sequence[Version]]]:
    """(index, dimension, active versions) of every living collection."""
    with database.read() as session:
        collections = session.scalars(select(Collection).where(Collection.deleted_at.is_(None))).all()
    for collection in collections:
        active = (
            select(Version)
            .join(Document, Document.active_version_id == Version.id)
            .where(Document.collection_id == collection.id, Document.deleted_at.is_(None))
        )
        with database.read() as session:
            versions = session.scalars(active).all()
        yield collection.index_id, collection.embedding_dimension, versions


def _chunks(places: Sequence[Json], version: Version, document: Document, index_id: str) -> list[StoredChunk]:
    text = zlib.decompress(version.text_zlib).decode()
    chunks = []
    for fields in places:
        place = Place(**(fields | {"headings": tuple(fields["headings"])}))
        chunks.append(
            StoredChunk(
                chunk_id=point_id(version.id, place.index),
                collection_id=index_id,
                document_id=document.id,
                version_id=version.id,
                document_name=document.name,
                text=text[place.start : place.end],
                **asdict(place) | {"headings": place.headings},
            )
        )
    return chunks


def _version_ids(database: Database) -> Sequence[str]:
    with database.read() as session:
        return session.scalars(select(Version.id)).all()


def _file_ids(database: Database) -> Sequence[str]:
    with database.read() as session:
        return session.scalars(select(StoredFile.id)).all()


def _job_ids(database: Database) -> Sequence[str]:
    waiting = select(Job.id).where(Job.state.in_(ACTIVE_JOB_STATES), Job.blob_path.is_not(None))
    with database.read() as session:
        return session.scalars(waiting).all()


def _counts(database: Database) -> Json:
    with database.read() as session:
        living = select(Collection.id).where(Collection.deleted_at.is_(None))
        documents = select(Document.id).where(Document.deleted_at.is_(None))
        return {
            "num_collections": len(session.scalars(living).all()),
            "num_documents": len(session.scalars(documents).all()),
        }
