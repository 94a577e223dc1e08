"""Collections, documents and jobs as the database knows them: names, who may see what, and their JSON.

Reads and simple rules only; whatever changes the vector store goes through the journal. Members see their own
collections, owners of the installation see all. Calls block.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
import zlib
from collections.abc import Collection as AnyCollection
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rag.types import PageSpan, ParsedDocument
from services.database import Collection, Database, Document, Job, User, Version, new_id
from services.errors import ApiError, conflict, invalid, not_found

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
                collection = Collection(
                    id=collection_id,
                    index_id=collection_id,
                    name=cleaned,
                    description=description,
                    owner_id=actor,
                    embedding_model=embedding_model,
                    embedding_dimension=dimension,
                )
                session.add(collection)
                session.flush()
                return collection_json(collection, 0, 0)
        except IntegrityError as error:
            if "owner_id" in str(error.orig) or "FOREIGN KEY" in str(error.orig):
                raise not_found("The user who asks does not exist any more.", code="unknown_user") from error
            raise conflict(
                f"A collection named {cleaned!r} exists already. Choose another name, or add documents to it.",
                code="collection_exists",
                param="name",
            ) from error

    def list_collections(self, actor: str) -> list[dict[str, Any]]:
        with self._database.read() as session:
            collections = session.scalars(_visible_to(session, actor).order_by(Collection.name)).all()
            sizes = _sizes(session, [collection.id for collection in collections])
            return [collection_json(each, *sizes.get(each.id, (0, 0))) for each in collections]

    def collection(self, name: str, actor: str) -> Collection:
        """404 with the nearest name where there is none that the actor may see."""
        with self._database.read() as session:
            visible = {each.name: each for each in session.scalars(_visible_to(session, actor))}
        found = visible.get(unicodedata.normalize("NFC", name))
        if found is not None:
            return found
        nearest = difflib.get_close_matches(name, visible, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else " `GET /v1/collections` lists those that you can use."
        raise not_found(f"There is no collection named {name!r}.{hint}", code="unknown_collection", param="collection")

    def describe_collection(self, name: str, actor: str) -> dict[str, Any]:
        collection = self.collection(name, actor)
        with self._database.read() as session:
            return collection_json(collection, *_sizes(session, [collection.id]).get(collection.id, (0, 0)))

    def list_documents(self, name: str, actor: str) -> list[dict[str, Any]]:
        collection = self.collection(name, actor)
        with self._database.read() as session:
            rows = session.execute(
                _active_documents().where(Document.collection_id == collection.id).order_by(Document.name)
            ).all()
            return [document_json(document, version, collection.name) for document, version in rows]

    def document(self, document_id: str, actor: str) -> dict[str, Any]:
        """Metadata, text and pages of a document's active version."""
        with self._database.read() as session:
            row = session.execute(_active_documents().where(Document.id == document_id)).one_or_none()
            collection = session.get(Collection, row[0].collection_id) if row else None
            if row is None or collection is None or not _may_see(session, collection, actor):
                raise unknown_document(document_id)
            parsed = stored_document(row[1])
            return document_json(row[0], row[1], collection.name) | {
                "text": parsed.text,
                "pages": [{"number": page.number, "start": page.start, "end": page.end} for page in parsed.pages],
            }

    def job(self, job_id: str, actor: str) -> dict[str, Any]:
        with self._database.read() as session:
            job = session.get(Job, job_id)
            collection = session.get(Collection, job.collection_id) if job else None
            if job is None or collection is None or not _may_see(session, collection, actor):
                raise not_found(f"There is no job {job_id!r}.", code="unknown_job")
            return job_json(job, collection.name)

    def list_jobs(self, name: str, actor: str) -> list[dict[str, Any]]:
        """The newest first."""
        collection = self.collection(name, actor)
        newest = select(Job).where(Job.collection_id == collection.id).order_by(Job.created_at.desc(), Job.id.desc())
        with self._database.read() as session:
            return [job_json(job, collection.name) for job in session.scalars(newest.limit(_MAX_JOBS_LISTED))]

    def keep_tuning(self, name: str, tuning: dict[str, Any] | None, actor: str) -> dict[str, Any]:
        """Store what was found; none: back to the configuration."""
        collection = self.collection(name, actor)
        with self._database.write() as session:
            row = session.get(Collection, collection.id)
            if row is None or row.deleted_at is not None:
                raise not_found(f"The collection {name!r} was deleted meanwhile.", code="unknown_collection")
            row.tuning = tuning
        return self.describe_collection(name, actor)

    def active_texts(self, name: str, actor: str) -> list[tuple[str, str]]:
        """(document id, text) of every document of a collection, by name."""
        collection = self.collection(name, actor)
        wanted = _active_documents().where(Document.collection_id == collection.id).order_by(Document.name)
        with self._database.read() as session:
            return [(document.id, stored_document(version).text) for document, version in session.execute(wanted)]

    def check_quotes(self, quotes: Sequence[tuple[str, int, int, str]], actor: str) -> list[bool]:
        """Whether each (version, start, end, quote) stands letter by letter in the stored version of a living document
        that the actor may see."""
        with self._database.read() as session:
            texts = {version_id: _readable_text(session, version_id, actor) for version_id, *_ in quotes}
        return [
            (text := texts[version_id]) is not None and bool(quote) and text[start:end] == quote
            for version_id, start, end, quote in quotes
        ]

    def active_versions(self, version_ids: AnyCollection[str]) -> set[str]:
        """Those of the versions that are their document's active one right now."""
        with self._database.read() as session:
            found = select(Document.active_version_id).where(
                Document.active_version_id.in_(version_ids), Document.deleted_at.is_(None)
            )
            return {version_id for version_id in session.scalars(found) if version_id is not None}


def _readable_text(session: Session, version_id: str, actor: str) -> str | None:
    version = session.get(Version, version_id)
    document = session.get(Document, version.document_id) if version else None
    collection = session.get(Collection, document.collection_id) if document else None
    if version is None or document is None or collection is None or document.deleted_at is not None:
        return None
    return stored_document(version).text if _may_see(session, collection, actor) else None


def unknown_document(document_id: str) -> ApiError:
    return not_found(f"There is no document {document_id!r}.", code="unknown_document")


def stored_document(version: Version) -> ParsedDocument:
    """A version's text as the parser gave it."""
    return ParsedDocument(
        text=zlib.decompress(version.text_zlib).decode(),
        mime_type=version.mime_type,
        title=version.title,
        pages=tuple(PageSpan(*page) for page in version.pages),
        language=version.language,
    )


def collection_json(collection: Collection, num_documents: int, num_chunks: int) -> dict[str, Any]:
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
        "created_at": int(collection.created_at.timestamp()),
    }


def document_json(document: Document, version: Version, collection: str) -> dict[str, Any]:
    return {
        "id": document.id,
        "object": "document",
        "collection": collection,
        "name": document.name,
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
        "document_id": job.document_id,
        "version_id": job.version_id,
        "num_chunks": job.num_chunks,
        "unchanged": job.unchanged,
        "error": error,
        "warnings": list(job.warnings),
        "created_at": int(job.created_at.timestamp()),
        "updated_at": int(job.updated_at.timestamp()),
    }


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


def _visible_to(session: Session, actor: str) -> Select[Collection]:
    living = select(Collection).where(Collection.deleted_at.is_(None))
    return living if _is_owner(session, actor) else living.where(Collection.owner_id == actor)


def _may_see(session: Session, collection: Collection, actor: str) -> bool:
    return collection.deleted_at is None and (collection.owner_id == actor or _is_owner(session, actor))


def _is_owner(session: Session, actor: str) -> bool:
    user = session.get(User, actor)
    return user is not None and user.role == "owner"


def _active_documents() -> Select[Document, Version]:
    return (
        select(Document, Version)
        .join(Version, Version.id == Document.active_version_id)
        .where(Document.deleted_at.is_(None))
    )


def _sizes(session: Session, collection_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Number of documents and of chunks by collection."""
    rows = session.execute(
        select(Document.collection_id, func.count(), func.coalesce(func.sum(Version.num_chunks), 0))
        .join(Version, Version.id == Document.active_version_id)
        .where(Document.deleted_at.is_(None), Document.collection_id.in_(collection_ids))
        .group_by(Document.collection_id)
    )
    return {collection_id: (num_documents, int(num_chunks)) for collection_id, num_documents, num_chunks in rows}
