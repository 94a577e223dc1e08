"""Collections, documents and jobs as the database knows them: names, who may see what, and their JSON.

Reads and simple rules only; whatever changes the vector store goes through the journal. Everybody sees what they may
read, and nothing tells them of the rest: no name, no count, no other error than for what does not exist. Calls block.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
import zlib
from collections.abc import Collection as AnyCollection
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import BindParameter, Select, bindparam, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rag.access import CollectionGrant, Reader
from rag.types import PageSpan, ParsedDocument
from services.database import Collection, Database, Document, Job, User, Version, new_id
from services.errors import ApiError, conflict, forbidden, invalid, not_found
from services.rights import Scope, grants_of, is_readable, is_visible, manages, reader_of, scope_of, values_of

_NAME = re.compile(r"[^\W_][\w .\-]{0,63}")
_MAX_DESCRIPTION = 2000
_MAX_JOBS_LISTED = 1000
ACTIVE_JOB_STATES = ("queued", "parsing", "embedding")


class Knowledge:
    """What is known and who may know it. `actor` is always a user id."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create_collection(
        self, name: str, description: str, actor: str, *, embedding_model: str, dimension: int
    ) -> dict[str, Any]:
        cleaned = _checked_name(name)
        if len(description) > _MAX_DESCRIPTION:
            raise invalid(f"The description is longer than {_MAX_DESCRIPTION} characters.", param="description")
        collection_id = new_id("col")
        try:
            with self._database.write() as session:
                reader = reader_of(session, actor)
                collection = Collection(
                    id=collection_id,
                    index_id=collection_id,
                    name=cleaned,
                    description=description,
                    owner_id=actor,
                    tenant=session.get_one(User, actor).tenant,
                    embedding_model=embedding_model,
                    embedding_dimension=dimension,
                )
                session.add(collection)
                session.flush()
                return collection_json(collection, 0, 0, reader)
        except IntegrityError as error:
            raise conflict(
                f"A collection named {cleaned!r} exists already. Choose another name, or add documents to it.",
                code="collection_exists",
                param="name",
            ) from error

    def list_collections(self, actor: str) -> list[dict[str, Any]]:
        with self._database.read() as session:
            reader = reader_of(session, actor)
            collections = session.scalars(_visible_collections(scope_of(reader)), values_of(reader)).all()
            sizes = _sizes(session, [collection.id for collection in collections], reader)
            return [collection_json(each, *sizes.get(each.id, (0, 0)), reader) for each in collections]

    def collection(self, name: str, actor: str) -> Collection:
        """By name or id. 404 with the nearest name where there is none of which the actor may read anything."""
        with self._database.read() as session:
            return find_collection(session, reader_of(session, actor), name)

    def managed_collection(self, name: str, actor: str) -> Collection:
        """The same for changes: 403 where the actor may read some of it and not change it."""
        with self._database.read() as session:
            reader = reader_of(session, actor)
            collection = find_collection(session, reader, name)
            require_manager(reader, collection)
            return collection

    def searchable(self, names: Sequence[str], actor: str) -> tuple[Reader, list[Collection], list[CollectionGrant]]:
        """Who asks and what a search may look into, all from one moment."""
        with self._database.read() as session:
            reader = reader_of(session, actor)
            collections = [find_collection(session, reader, name) for name in names]
            return reader, collections, grants_of(session, collections)

    def describe_collection(self, name: str, actor: str) -> dict[str, Any]:
        with self._database.read() as session:
            reader = reader_of(session, actor)
            collection = find_collection(session, reader, name)
            size = _sizes(session, [collection.id], reader).get(collection.id, (0, 0))
            return collection_json(collection, *size, reader)

    def list_documents(self, name: str, actor: str) -> list[dict[str, Any]]:
        with self._database.read() as session:
            reader = reader_of(session, actor)
            collection = find_collection(session, reader, name)
            rows = session.execute(_documents_of(scope_of(reader)), values_of(reader, wanted=collection.id)).all()
            shows_source = manages(reader, collection)
            return [document_json(*row, collection.name, shows_source=shows_source) for row in rows]

    def document(self, document_id: str, actor: str) -> dict[str, Any]:
        """Metadata, text and pages of a document's active version."""
        with self._database.read() as session:
            document, version = find_document(session, reader_of(session, actor), document_id)
            parsed = stored_document(version)
            return document_json(document, version, session.get_one(Collection, document.collection_id).name) | {
                "text": parsed.text,
                "pages": [{"number": page.number, "start": page.start, "end": page.end} for page in parsed.pages],
            }

    def job(self, job_id: str, actor: str) -> dict[str, Any]:
        """Jobs name files and their faults, so they are of those who may change the collection."""
        with self._database.read() as session:
            reader = reader_of(session, actor)
            job = session.get(Job, job_id)
            collection = session.get(Collection, job.collection_id) if job else None
            if job is None or collection is None or collection.deleted_at is not None:
                raise unknown_job(job_id)
            if not manages(reader, collection):
                raise unknown_job(job_id)
            return job_json(job, collection.name)

    def list_jobs(self, name: str, actor: str) -> list[dict[str, Any]]:
        """The newest first; none for those who may only read."""
        with self._database.read() as session:
            reader = reader_of(session, actor)
            collection = find_collection(session, reader, name)
            if not manages(reader, collection):
                return []
            newest = select(Job).where(Job.collection_id == collection.id)
            newest = newest.order_by(Job.created_at.desc(), Job.id.desc()).limit(_MAX_JOBS_LISTED)
            return [job_json(job, collection.name) for job in session.scalars(newest)]

    def keep_tuning(self, name: str, tuning: dict[str, Any] | None, actor: str) -> dict[str, Any]:
        """Store what was found; none: back to the configuration. 403 for those who may only read."""
        with self._database.write() as session:
            reader = reader_of(session, actor)
            collection = find_collection(session, reader, name)
            require_manager(reader, collection)
            collection.tuning = tuning
        return self.describe_collection(name, actor)

    def readable_texts(self, name: str, actor: str) -> list[tuple[str, str]]:
        """(document id, text) of every document of a collection that the actor may read, by name."""
        with self._database.read() as session:
            reader = reader_of(session, actor)
            collection = find_collection(session, reader, name)
            rows = session.execute(_documents_of(scope_of(reader)), values_of(reader, wanted=collection.id))
            return [(document.id, stored_document(version).text) for document, version in rows]

    def check_quotes(self, quotes: Sequence[tuple[str, int, int, str]], actor: str) -> list[bool]:
        """Whether each (version, start, end, quote) stands letter by letter in the stored, active version of a document
        that the actor may read."""
        versions = {version_id for version_id, *_ in quotes}
        with self._database.read() as session:
            reader = reader_of(session, actor)
            readable = _readable_documents(scope_of(reader)).where(Version.id.in_(versions))
            found = session.execute(readable, values_of(reader))
            texts = {version.id: stored_document(version).text for _, version in found}
        return [
            bool(quote) and version_id in texts and texts[version_id][start:end] == quote
            for version_id, start, end, quote in quotes
        ]

    def readable_versions(self, version_ids: AnyCollection[str], actor: str) -> set[str]:
        """Those of the versions that are their document's active one right now, and that the actor may read."""
        with self._database.read() as session:
            reader = reader_of(session, actor)
            found = _versions_among(scope_of(reader))
            return set(session.scalars(found, values_of(reader, version_ids=list(version_ids))))


def find_collection(session: Session, reader: Reader, name: str) -> Collection:
    """By name or id, among those of which the reader may read anything. One's own goes before another's of that name;
    where several of others have it, their ids tell them apart."""
    wanted = unicodedata.normalize("NFC", name)
    found = session.scalars(_collections_called(scope_of(reader)), values_of(reader, wanted=wanted)).all()
    for is_it in (lambda each: each.id == wanted, lambda each: each.owner_id == reader.user_id):
        if chosen := next((each for each in found if is_it(each)), None):
            return chosen
    if len(found) > 1:
        ids = ", ".join(each.id for each in found)
        raise conflict(
            f"{len(found)} collections that you may read are named {name!r}. Say which one by its id: {ids}.",
            code="ambiguous_collection",
            param="collection",
        )
    if found:
        return found[0]
    visible = session.scalars(_visible_collections(scope_of(reader)), values_of(reader))
    raise unknown_collection(name, [each.name for each in visible])


def find_document(session: Session, reader: Reader, document_id: str) -> tuple[Document, Version]:
    """A document that the reader may read, with its active version; 404 for any other."""
    row = session.execute(_document_with_id(scope_of(reader)), values_of(reader, wanted=document_id)).one_or_none()
    if row is None:
        raise unknown_document(document_id)
    return row[0], row[1]


def require_manager(reader: Reader, collection: Collection) -> None:
    """For what the reader sees already: 403 where they may not change it."""
    if not manages(reader, collection):
        raise forbidden(
            f"You may read in the collection {collection.name!r} and not change it. Ask its owner or an administrator.",
            code="read_only_collection",
        )


def unknown_collection(name: str, visible_names: Sequence[str] = ()) -> ApiError:
    nearest = difflib.get_close_matches(name, visible_names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else " `GET /v1/collections` lists those that you can use."
    return not_found(f"There is no collection named {name!r}.{hint}", code="unknown_collection", param="collection")


def unknown_document(document_id: str) -> ApiError:
    return not_found(f"There is no document {document_id!r}.", code="unknown_document")


def unknown_job(job_id: str) -> ApiError:
    return not_found(f"There is no job {job_id!r}.", code="unknown_job")


def stored_document(version: Version) -> ParsedDocument:
    """A version's text as the parser gave it."""
    return ParsedDocument(
        text=zlib.decompress(version.text_zlib).decode(),
        mime_type=version.mime_type,
        title=version.title,
        pages=tuple(PageSpan(*page) for page in version.pages),
        language=version.language,
    )


def collection_json(collection: Collection, num_documents: int, num_chunks: int, reader: Reader) -> dict[str, Any]:
    """The counts are those of what the reader may read."""
    return {
        "id": collection.id,
        "object": "collection",
        "name": collection.name,
        "description": collection.description,
        "embedding_model": collection.embedding_model,
        "embedding_dimension": collection.embedding_dimension,
        "num_documents": num_documents,
        "num_chunks": num_chunks,
        "tuning": collection.tuning,
        "can_change": manages(reader, collection),
        "created_at": int(collection.created_at.timestamp()),
    }


def document_json(
    document: Document, version: Version, collection: str, *, shows_source: bool = False
) -> dict[str, Any]:
    """Where a file lay on somebody's machine is of those alone who may change the collection; addresses are of all."""
    is_web = (document.origin or "").startswith(("http://", "https://"))
    return {
        "id": document.id,
        "object": "document",
        "collection": collection,
        "collection_id": document.collection_id,
        "name": document.name,
        "source": document.source if shows_source else None,
        "origin": document.origin if shows_source or is_web else None,
        "version_id": version.id,
        "title": version.title,
        "language": version.language,
        "mime_type": version.mime_type,
        "content_sha256": version.content_sha256,
        "num_bytes": version.num_bytes,
        "num_characters": version.num_characters,
        "num_pages": len(version.pages),
        "num_chunks": version.num_chunks,
        "created_at": int(document.created_at.timestamp()),
        "updated_at": int(version.created_at.timestamp()),
    }


def job_json(job: Job, collection: str) -> dict[str, Any]:
    error = {"code": job.error_code, "message": job.error_message} if job.error_code else None
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "collection": collection,
        "filename": job.filename,
        "state": job.state,
        "progress": job.progress,
        "paused": job.is_paused,
        "batch": job.batch,
        "source": job.source,
        "origin": job.origin,
        "duplicate_of": job.duplicate_of,
        "num_bytes": job.num_bytes,
        "num_tokens": job.num_tokens,
        "document_id": job.document_id,
        "version_id": job.version_id,
        "num_chunks": job.num_chunks,
        "unchanged": job.unchanged,
        "error": error,
        "warnings": list(job.warnings),
        "created_at": int(job.created_at.timestamp()),
        "updated_at": int(job.updated_at.timestamp()),
        "started_at": _seconds(job.started_at),
        "ended_at": _seconds(job.ended_at),
    }


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _checked_name(name: str) -> str:
    cleaned = unicodedata.normalize("NFC", name)
    if not _NAME.fullmatch(cleaned) or cleaned != cleaned.strip():
        raise invalid(
            f"{name[:80]!r} cannot name a collection: use 1 to 64 letters, digits, spaces, dots, dashes and "
            "underscores, beginning with a letter or digit.",
            param="name",
            code="bad_collection_name",
        )
    return cleaned


@cache
def _visible_collections(scope: Scope) -> Select[Collection]:
    return select(Collection).where(is_visible(scope)).order_by(Collection.name, Collection.created_at)


@cache
def _collections_called(scope: Scope) -> Select[Collection]:
    wanted: BindParameter[Any] = bindparam("wanted")
    return _visible_collections(scope).where(or_(Collection.id == wanted, Collection.name == wanted))


@cache
def _documents_of(scope: Scope) -> Select[Document, Version]:
    return _readable_documents(scope).where(Document.collection_id == bindparam("wanted")).order_by(Document.name)


@cache
def _document_with_id(scope: Scope) -> Select[Document, Version]:
    return _readable_documents(scope).where(Document.id == bindparam("wanted"))


@cache
def _versions_among(scope: Scope) -> Select[str]:
    wanted: BindParameter[Any] = bindparam("version_ids", expanding=True)
    return _readable_documents(scope).with_only_columns(Version.id).where(Version.id.in_(wanted))


@cache
def _sizes_of(scope: Scope) -> Select[str, int, int]:
    return (
        _readable_documents(scope)
        .with_only_columns(Document.collection_id, func.count(), func.coalesce(func.sum(Version.num_chunks), 0))
        .where(Document.collection_id.in_(bindparam("collection_ids", expanding=True)))
        .group_by(Document.collection_id)
    )


def _readable_documents(scope: Scope) -> Select[Document, Version]:
    return (
        select(Document, Version)
        .join(Version, Version.id == Document.active_version_id)
        .join(Collection, Collection.id == Document.collection_id)
        .where(is_readable(scope))
    )


def _sizes(session: Session, collection_ids: Sequence[str], reader: Reader) -> dict[str, tuple[int, int]]:
    """Number of documents and of chunks by collection, of what the reader may read."""
    rows = session.execute(_sizes_of(scope_of(reader)), values_of(reader, collection_ids=list(collection_ids)))
    return {collection_id: (num_documents, int(num_chunks)) for collection_id, num_documents, num_chunks in rows}
