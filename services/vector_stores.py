"""OpenAI's vector stores on collections: each collection is one, and each one made here is a collection.

A file in a vector store is a document of that collection, made by an ingestion job like any other. What changes
documents and what finds them goes through the store's own methods with the caller's rights; only what OpenAI has beside
that (names, metadata, attributes, which file a document came from) is kept here.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.accounts import Actor
from services.attribute_filters import Matches
from services.calls import Calls
from services.database import (
    Collection,
    Database,
    Document,
    Job,
    StoredFile,
    VectorStoreFile,
    VectorStoreInfo,
    Version,
    new_id,
)
from services.errors import ApiError, conflict, not_found
from services.files import Files
from services.knowledge import ACTIVE_JOB_STATES
from services.message_sources import readable_documents
from services.rights import is_readable, reader_of, scope_of, values_of

Json = dict[str, Any]
_NOT_IN_NAMES = re.compile(r"[^\w .\-]+")
_MAX_NAME = 64
_UNREADABLE = ("unknown_type", "type_mismatch", "encrypted")
_BROKEN = ("damaged", "empty_file", "too_large", "timeout", "out_of_memory")


class VectorStores:
    def __init__(self, database: Database, store: Calls, files: Files) -> None:
        self._database = database
        self._store = store
        self._files = files

    # Vector stores

    async def create(
        self, actor: Actor, name: str | None, description: str, attributes: Json, file_ids: Sequence[str]
    ) -> Json:
        for file_id in file_ids:
            await asyncio.to_thread(self._files.own, actor, file_id)
        made = await self._make_collection(actor, name, description)
        await asyncio.to_thread(self._set_info, made["id"], {"name": name, "attributes": attributes})
        for file_id in file_ids:
            await self.add_file(actor, made["id"], file_id, {})
        return await self.get(actor, made["id"])

    async def _make_collection(self, actor: Actor, name: str | None, description: str) -> Json:
        """A collection with the nearest name that is allowed and free."""
        wanted = _collection_name(name)
        while True:
            try:
                made: Json = await self._store.call("create_collection", wanted, description, actor.user_id)
                return made
            except ApiError as error:
                if error.code != "collection_exists":
                    raise
            wanted = f"{_collection_name(name)[: _MAX_NAME - 7].rstrip()} {secrets.token_hex(3)}"

    async def list_stores(self, actor: Actor) -> list[Json]:
        """Those that the caller may read, the newest last."""
        collections = await self._store.call("list_collections", actor.user_id)
        return await asyncio.to_thread(self._describe, actor, collections)

    async def get(self, actor: Actor, store_id: str) -> Json:
        collection = await self._collection(actor, store_id)
        return (await asyncio.to_thread(self._describe, actor, [collection]))[0]

    async def update(self, actor: Actor, store_id: str, changes: Json) -> Json:
        """`changes` may hold `name` and `attributes`."""
        await self._managed(actor, store_id)
        await asyncio.to_thread(self._set_info, store_id, changes)
        return await self.get(actor, store_id)

    async def delete(self, actor: Actor, store_id: str) -> Json:
        collection = await self._collection(actor, store_id)
        await self._store.call("delete_collection", collection["id"], actor.user_id)
        return {"id": store_id, "object": "vector_store.deleted", "deleted": True}

    # Their files

    async def add_file(
        self, actor: Actor, store_id: str, file_id: str, attributes: Json, batch_id: str | None = None
    ) -> Json:
        """Begin to make the file searchable. A file that is there already stays, with the new attributes."""
        collection = await self._collection(actor, store_id)
        file = await asyncio.to_thread(self._files.own, actor, file_id)
        known = await self._file_rows(actor, store_id)
        if any(entry["id"] == file_id and entry["status"] != "failed" for entry in known):
            await self._managed(actor, store_id)
            return await self.update_file(actor, store_id, file_id, attributes)
        name = await asyncio.to_thread(self._free_name, store_id, file)
        path = self._files.path(file_id)
        job = await self._store.call("submit_document", collection["id"], name, path, actor.user_id)
        await asyncio.to_thread(self._add_row, store_id, file_id, name, job["id"], attributes, batch_id)
        return await self.file(actor, store_id, file_id)

    async def files(self, actor: Actor, store_id: str, batch_id: str | None = None) -> list[Json]:
        """Files of a vector store, the newest last; with `batch_id` only those of one batch."""
        await self._collection(actor, store_id)
        rows = await self._file_rows(actor, store_id)
        return [_public(row) for row in rows if batch_id in (None, row["batch_id"])]

    async def file(self, actor: Actor, store_id: str, file_id: str) -> Json:
        return _public(await self._file_row(actor, store_id, file_id))

    async def update_file(self, actor: Actor, store_id: str, file_id: str, attributes: Json) -> Json:
        await self._managed(actor, store_id)
        await self._file_row(actor, store_id, file_id)
        await asyncio.to_thread(self._set_attributes, store_id, file_id, attributes)
        return await self.file(actor, store_id, file_id)

    async def remove_file(self, actor: Actor, store_id: str, file_id: str) -> Json:
        """Take a file out of a vector store, with all that was made of it; the file itself stays."""
        collection = await self._collection(actor, store_id)
        row = await self._file_row(actor, store_id, file_id)
        if row["document_id"] is not None:
            await self._store.call("delete_document", collection["id"], row["document_id"], actor.user_id)
        elif row["status"] == "in_progress":
            raise conflict(
                "The file is still being read. Wait until its status is completed or failed; then remove it.",
                code="file_in_progress",
            )
        await asyncio.to_thread(self._delete_row, store_id, file_id)
        return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}

    async def file_text(self, actor: Actor, store_id: str, file_id: str) -> str:
        row = await self._file_row(actor, store_id, file_id)
        if row["document_id"] is None:
            raise conflict(f"The file has no text yet; its status is {row['status']}.", code="file_not_ready")
        document = await self._store.call("document", row["document_id"], actor.user_id)
        return str(document["text"])

    async def stores_of(self, actor: Actor, file_id: str) -> list[str]:
        """Ids of the vector stores that hold a file of the caller's."""
        await asyncio.to_thread(self._files.own, actor, file_id)
        return await asyncio.to_thread(self._store_ids, file_id)

    async def batch(self, actor: Actor, store_id: str, batch_id: str) -> Json:
        rows = [row for row in await self._file_rows(actor, store_id) if row["batch_id"] == batch_id]
        if not rows:
            raise not_found(f"There is no file batch {batch_id[:80]!r}.", code="unknown_file_batch")
        counts = _counts(rows)
        return {
            "id": batch_id,
            "object": "vector_store.files_batch",
            "created_at": min(row["created_at"] for row in rows),
            "file_counts": counts,
            "status": "in_progress" if counts["in_progress"] else "completed",
            "vector_store_id": store_id,
        }

    # For searches

    async def require(self, actor: Actor, store_id: str) -> None:
        """404 where there is none that the caller may read."""
        await self._collection(actor, store_id)

    async def searchable(self, actor: Actor, store_id: str) -> dict[str, Json]:
        """Files that can be found, by the id of their document."""
        rows = await self._file_rows(actor, store_id)
        return {row["document_id"]: row for row in rows if row["document_id"] is not None}

    async def matching_documents(self, actor: Actor, store_id: str, matches: Matches) -> list[str]:
        """Documents whose attributes match; those that came another way have none."""
        found = await self.searchable(actor, store_id)
        documents = await self._store.call("list_documents", store_id, actor.user_id)
        return [d["id"] for d in documents if matches(found[d["id"]]["attributes"] if d["id"] in found else {})]

    # Rights

    async def _collection(self, actor: Actor, store_id: str) -> Json:
        """404 where there is none that the caller may read: the store decides."""
        try:
            collection: Json = await self._store.call("collection", store_id, actor.user_id)
            if collection["id"] == store_id:
                return collection
        except ApiError as error:
            if error.status != 404:
                raise
        raise not_found(f"There is no vector store {store_id[:80]!r}.", code="unknown_vector_store")

    async def _managed(self, actor: Actor, store_id: str) -> None:
        await self._collection(actor, store_id)
        await self._store.call("require_manager", store_id, actor.user_id)

    # Rows

    def _set_info(self, store_id: str, changes: Json) -> None:
        with self._database.write() as session:
            row = session.get(VectorStoreInfo, store_id)
            if row is None:
                row = VectorStoreInfo(collection_id=store_id, name=None, attributes={})
                session.add(row)
            for name, value in changes.items():
                setattr(row, name, value)

    def _describe(self, actor: Actor, collections: Sequence[Json]) -> list[Json]:
        """Counts and sizes are those of what the caller may read."""
        ids = [collection["id"] for collection in collections]
        with self._database.read() as session:
            wanted = select(VectorStoreInfo).where(VectorStoreInfo.collection_id.in_(ids))
            infos = {row.collection_id: row for row in session.scalars(wanted)}
            files = {store_id: _shown(session, actor, rows) for store_id, rows in _rows(session, ids).items()}
            sizes = _sizes(session, actor, ids)
            # Seconds, as the API has them, would not keep the order of what was made together.
            order = select(Collection.id).where(Collection.id.in_(ids)).order_by(Collection.created_at, Collection.id)
            places = {store_id: place for place, store_id in enumerate(session.scalars(order))}
        oldest_first = sorted(collections, key=lambda each: places.get(each["id"], len(places)))
        return [_store_json(each, infos.get(each["id"]), files.get(each["id"], []), sizes) for each in oldest_first]

    async def _file_rows(self, actor: Actor, store_id: str) -> list[Json]:
        """What the caller may see of them: files of documents that they may read, and their own on the way."""
        return await asyncio.to_thread(self._shown_rows, actor, store_id)

    def _shown_rows(self, actor: Actor, store_id: str) -> list[Json]:
        with self._database.read() as session:
            return _shown(session, actor, _rows(session, [store_id]).get(store_id, []))

    async def _file_row(self, actor: Actor, store_id: str, file_id: str) -> Json:
        await self._collection(actor, store_id)
        for row in await self._file_rows(actor, store_id):
            if row["id"] == file_id:
                return row
        raise not_found(f"There is no file {file_id[:80]!r} in the vector store {store_id!r}.", code="file_not_found")

    def _free_name(self, store_id: str, file: StoredFile) -> str:
        """The file's own name, or with a part of its id where a document or another file has it."""
        with self._database.read() as session:
            documents = select(Document.name).where(Document.collection_id == store_id, Document.deleted_at.is_(None))
            others = select(VectorStoreFile.document_name).where(
                VectorStoreFile.collection_id == store_id, VectorStoreFile.file_id != file.id
            )
            taken = {*session.scalars(documents), *session.scalars(others)}
        if file.filename not in taken:
            return file.filename
        path = PurePosixPath(file.filename)
        return f"{path.stem} ({file.id[-8:]}){path.suffix}"

    def _add_row(
        self, store_id: str, file_id: str, name: str, job_id: str, attributes: Json, batch_id: str | None
    ) -> None:
        with self._database.write() as session:
            row = session.get(VectorStoreFile, (store_id, file_id))
            if row is None:
                row = VectorStoreFile(collection_id=store_id, file_id=file_id)
                session.add(row)
            row.document_name, row.job_id, row.attributes, row.batch_id = name, job_id, attributes, batch_id

    def _set_attributes(self, store_id: str, file_id: str, attributes: Json) -> None:
        with self._database.write() as session:
            session.get_one(VectorStoreFile, (store_id, file_id)).attributes = attributes

    def _delete_row(self, store_id: str, file_id: str) -> None:
        with self._database.write() as session:
            row = session.get(VectorStoreFile, (store_id, file_id))
            if row is not None:
                session.delete(row)

    def _store_ids(self, file_id: str) -> list[str]:
        wanted = select(VectorStoreFile.collection_id).where(VectorStoreFile.file_id == file_id)
        with self._database.read() as session:
            return list(session.scalars(wanted))


def new_batch_id() -> str:
    return new_id("vsfb")


def _rows(session: Session, store_ids: Sequence[str]) -> dict[str, list[Json]]:
    """Files with their state, by vector store, the newest last. Files whose document was deleted otherwise are gone."""
    found = session.execute(
        select(VectorStoreFile, StoredFile, Job, Document, Version)
        .join(StoredFile, StoredFile.id == VectorStoreFile.file_id)
        .outerjoin(Job, Job.id == VectorStoreFile.job_id)
        .outerjoin(
            Document,
            (Document.collection_id == VectorStoreFile.collection_id)
            & (Document.name == VectorStoreFile.document_name)
            & Document.deleted_at.is_(None)
            & Document.active_version_id.is_not(None),
        )
        .outerjoin(Version, Version.id == Document.active_version_id)
        .where(VectorStoreFile.collection_id.in_(store_ids))
        .order_by(VectorStoreFile.created_at, VectorStoreFile.file_id)
    )
    rows: dict[str, list[Json]] = {}
    for row, file, job, document, version in found:
        if status := _status(job, document):
            rows.setdefault(row.collection_id, []).append(
                {
                    "id": row.file_id,
                    "object": "vector_store.file",
                    "created_at": int(row.created_at.timestamp()),
                    "vector_store_id": row.collection_id,
                    "status": status,
                    "last_error": _last_error(job) if status == "failed" else None,
                    "usage_bytes": version.num_bytes if version is not None else 0,
                    "attributes": row.attributes,
                    "chunking_strategy": {"type": "other"},
                    "document_id": document.id if document is not None and status == "completed" else None,
                    "batch_id": row.batch_id,
                    "owner_id": file.owner_id,
                    "filename": file.filename,
                }
            )
    return rows


def _shown(session: Session, actor: Actor, rows: Sequence[Json]) -> list[Json]:
    """Files of documents that the caller may read, and the caller's own on the way."""
    documents = {row["document_id"] for row in rows if row["document_id"] is not None}
    readable = readable_documents(session, documents, actor.user_id) if documents else set()
    return [
        row
        for row in rows
        if (row["document_id"] in readable if row["document_id"] else row["owner_id"] == actor.user_id)
    ]


def _status(job: Job | None, document: Document | None) -> str | None:
    if job is not None and job.state in ACTIVE_JOB_STATES:
        return "in_progress"
    if document is not None:
        return "completed"
    return job.state if job is not None and job.state in ("failed", "cancelled") else None


def _last_error(job: Job) -> Json:
    code = "unsupported_file" if job.error_code in _UNREADABLE else "invalid_file"
    if job.error_code not in (*_UNREADABLE, *_BROKEN):
        code = "server_error"
    return {"code": code, "message": job.error_message or "No reason was given."}


def _public(row: Json) -> Json:
    return {
        name: value for name, value in row.items() if name not in ("document_id", "batch_id", "owner_id", "filename")
    }


def _counts(rows: Sequence[Json]) -> Json:
    states = ("in_progress", "completed", "failed", "cancelled")
    counts = {state: sum(row["status"] == state for row in rows) for state in states}
    return counts | {"total": len(rows)}


def _sizes(session: Session, actor: Actor, store_ids: Sequence[str]) -> dict[str, int]:
    reader = reader_of(session, actor.user_id)
    rows = session.execute(
        select(Document.collection_id, func.sum(Version.num_bytes))
        .join(Version, Version.id == Document.active_version_id)
        .join(Collection, Collection.id == Document.collection_id)
        .where(Document.collection_id.in_(store_ids), is_readable(scope_of(reader)))
        .group_by(Document.collection_id),
        values_of(reader),
    )
    return {store_id: int(size) for store_id, size in rows}


def _store_json(collection: Json, info: VectorStoreInfo | None, files: Sequence[Json], sizes: dict[str, int]) -> Json:
    counts = _counts(files)
    # Documents that came another way are searchable too.
    others = max(0, collection["num_documents"] - counts["completed"])
    counts["completed"] += others
    counts["total"] += others
    return {
        "id": collection["id"],
        "object": "vector_store",
        "created_at": collection["created_at"],
        "last_active_at": None,
        "name": info.name if info is not None and info.name is not None else collection["name"],
        "description": collection["description"],
        "metadata": info.attributes if info is not None else {},
        "status": "in_progress" if counts["in_progress"] else "completed",
        "file_counts": counts,
        "usage_bytes": sizes.get(collection["id"], 0),
        "expires_after": None,
        "expires_at": None,
        "windfarm": {"collection": collection["name"], "embedding_model": collection["embedding_model"]},
    }


def _collection_name(name: str | None) -> str:
    cleaned = " ".join(_NOT_IN_NAMES.sub(" ", name or "").split()).lstrip("_ .-")[:_MAX_NAME].strip()
    return cleaned or "vector store"
