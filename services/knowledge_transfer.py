"""Moves collections from one windfarm to another, with their vectors, so that nothing is embedded again.

An export holds what its maker manages, document by document as it was at one moment; ingestion goes on meanwhile. An
import is all or nothing: everything is written under a collection that nobody sees, and one transaction shows it.
What a kill leaves of one is swept at the next start. Calls block.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rag.access import label_points
from rag.types import StoredChunk
from rag.vector_store import Place, VectorStore, point_id
from services.archive import ArchiveReader, ArchiveWriter
from services.blobs import Blobs
from services.database import (
    Collection,
    CollectionReader,
    Database,
    Document,
    DocumentReader,
    Group,
    User,
    VectorStoreInfo,
    Version,
    new_id,
    utc_now,
)
from services.errors import ApiError, conflict, forbidden, invalid
from services.journal import Journal
from services.knowledge import Knowledge
from services.rights import manages, reader_of

KIND = "windfarm-knowledge"
Json = dict[str, Any]
_VERSION_FIELDS = ("content_sha256", "num_bytes", "mime_type", "title", "language", "num_chunks", "num_characters")


@dataclass(frozen=True, slots=True)
class RunningModel:
    """The embedding model that runs here."""

    name: str
    dimension: int


class KnowledgeTransfer:
    def __init__(self, database: Database, store: VectorStore, journal: Journal, blobs: Blobs) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._originals = blobs.originals
        self._knowledge = Knowledge(database)

    # Out

    def export(self, names: Sequence[str], actor: str, target: Path) -> Json:
        """Write collections into the file `target`; without names all that the actor manages."""
        collections = [self._knowledge.managed_collection(name, actor) for name in names] or self._managed(actor)
        if not collections:
            raise invalid("There is no collection here that you manage, so there is nothing to export.")
        with ArchiveWriter(target, KIND) as archive:
            written = [self._export_collection(archive, collection) for collection in collections]
            archive.facts = {"made_at": utc_now().isoformat(), "collections": written}
        return {"object": "kb.export", "collections": written, "num_bytes": target.stat().st_size}

    def _managed(self, actor: str) -> list[Collection]:
        with self._database.read() as session:
            reader = reader_of(session, actor)
            rows = session.scalars(select(Collection).where(Collection.deleted_at.is_(None)).order_by(Collection.name))
            return [row for row in rows if manages(reader, row)]

    def _export_collection(self, archive: ArchiveWriter, collection: Collection) -> Json:
        with self._database.read() as session:
            living = select(Document.id).where(Document.collection_id == collection.id, Document.deleted_at.is_(None))
            document_ids = session.scalars(living.order_by(Document.name)).all()
            described = _collection_json(session, collection)
        # One document at a time, so that whoever wants to change something waits for one document at most.
        documents = [
            document for each in document_ids if (document := self._export_document(archive, collection.id, each))
        ]
        archive.add_json(f"{collection.id}/collection.json", described | {"documents": documents})
        num_passages = sum(document["version"]["num_chunks"] for document in documents)
        return {
            "id": collection.id,
            "name": collection.name,
            "embedding_model": described["embedding_model"],
            "embedding_dimension": described["embedding_dimension"],
            "num_documents": len(documents),
            "num_passages": num_passages,
        }

    def _export_document(self, archive: ArchiveWriter, collection_id: str, document_id: str) -> Json | None:
        """None where it was deleted meanwhile."""
        with self._journal.turn:
            with self._database.read() as session:
                collection = session.get(Collection, collection_id)
                document = session.get(Document, document_id)
                version = session.get(Version, document.active_version_id or "") if document is not None else None
                if collection is None or document is None or version is None or document.deleted_at is not None:
                    return None
                readers = list(_readers(session, document))
            placed = self._store.vectors_of(collection.index_id, version.id)
            original = self._originals.path(version.id)
            if len(placed.places) != version.num_chunks:
                raise conflict(
                    f"{document.name!r} has {len(placed.places)} of its {version.num_chunks} passages in the vector "
                    "store. Restart windfarm: it repairs this; then export again.",
                    code="store_incomplete",
                )
            folder = f"{collection_id}/{version.id}"
            archive.add_bytes(f"{folder}/text.txt", zlib.decompress(version.text_zlib))
            archive.add_json(f"{folder}/places.json", [asdict(place) for place in placed.places])
            archive.add_vectors(f"{folder}/vectors.f32", placed.vectors)
            if original is not None:
                archive.add_file(f"{folder}/original", original)
        return {
            "id": document.id,
            "name": document.name,
            "created_at": document.created_at.isoformat(),
            "has_own_readers": document.has_own_readers,
            "readers": readers,
            "source": document.source,
            "origin": document.origin,
            "version": {name: getattr(version, name) for name in _VERSION_FIELDS}
            | {"id": version.id, "pages": version.pages, "created_at": version.created_at.isoformat()},
        }

    # In

    def import_(self, source: Path, actor: str, model: RunningModel) -> Json:
        """Take all collections of a file over, with their ids. The importer owns them; readers who are known here by
        their id keep their rights, all others lose them."""
        self.require_importer(actor)
        with self._database.read() as session:
            tenant = session.get_one(User, actor).tenant
        with ArchiveReader(source, KIND) as archive:
            collections = [_checked(archive, name) for name in archive.names() if name.endswith("/collection.json")]
            for collection in collections:
                _check_model(collection, model)
            self._check_free(collections)
            staged = [_Staged(collection, new_id("col")) for collection in collections]
            try:
                with self._database.write() as session:
                    session.add_all(each.hidden_row(actor, tenant) for each in staged)
                for each in staged:
                    self._stage(archive, each, tenant)
                self._show(archive, staged, actor, tenant)
            except BaseException:
                self._undo(staged)
                raise
        return {
            "object": "kb.import",
            "collections": [
                {
                    "id": each.collection["id"],
                    "name": each.collection["name"],
                    "num_documents": len(each.collection["documents"]),
                    "num_passages": sum(d["version"]["num_chunks"] for d in each.collection["documents"]),
                }
                for each in staged
            ],
        }

    def require_importer(self, actor: str) -> None:
        with self._database.read() as session:
            reader = reader_of(session, actor)
        if not reader.is_administrator:
            raise forbidden("Only owners and administrators import: an import brings vectors and ids of its own.")

    def _check_free(self, collections: Sequence[Json]) -> None:
        ids = [collection["id"] for collection in collections]
        with self._database.read() as session:
            taken = session.scalars(select(Collection).where(Collection.id.in_(ids))).first()
            for collection in collections:
                documents = [document["id"] for document in collection["documents"]]
                versions = [document["version"]["id"] for document in collection["documents"]]
                for kind, wanted in ((Document, documents), (Version, versions)):
                    for start in range(0, len(wanted), 5000):
                        known = session.scalars(select(kind.id).where(kind.id.in_(wanted[start : start + 5000])))
                        if known.first() is not None:
                            raise _is_there(collection["name"])
        if taken is not None:
            raise _is_there(taken.name)

    def _stage(self, archive: ArchiveReader, staged: _Staged, tenant: str) -> None:
        for document in staged.collection["documents"]:
            version = document["version"]
            folder = f"{staged.collection['id']}/{version['id']}"
            text = archive.read(f"{folder}/text.txt").decode()
            vectors = archive.read_vectors(f"{folder}/vectors.f32", staged.collection["embedding_dimension"])
            chunks = _chunks(archive.read_json(f"{folder}/places.json"), text, staged.index_id, document)
            if not len(chunks) == len(vectors) == version["num_chunks"]:
                raise invalid(f"The passages and vectors of {document['name']!r} do not fit.", code="damaged_archive")
            labels = label_points(tenant, self._known_readers(document) if document["has_own_readers"] else None)
            if chunks:
                self._store.upsert(staged.index_id, chunks, vectors, active=False, labels=labels)
                self._store.activate_version(staged.index_id, version["id"], labels=labels)
            if archive.has(f"{folder}/original"):
                with TemporaryDirectory(dir=self._originals.folder.parent, prefix="import-") as temporary:
                    archive.copy(f"{folder}/original", Path(temporary) / "original")
                    self._originals.keep(version["id"], Path(temporary) / "original")

    def _known_readers(self, entry: Json) -> frozenset[str]:
        wanted = [str(reader) for reader in entry["readers"]]
        with self._database.read() as session:
            users = session.scalars(select(User.id).where(User.id.in_(wanted))).all()
            groups = session.scalars(select(Group.id).where(Group.id.in_(wanted))).all()
        return frozenset((*users, *groups))

    def _show(self, archive: ArchiveReader, staged: Sequence[_Staged], actor: str, tenant: str) -> None:
        """The one transaction after which everything is there."""
        with self._journal.turn:
            for each in staged:
                expected = sum(document["version"]["num_chunks"] for document in each.collection["documents"])
                if self._store.count(each.index_id, active=True) != expected:
                    raise conflict("The vector store did not keep all passages. Try again.", code="store_incomplete")
            try:
                with self._database.write() as session:
                    for each in staged:
                        self._add_rows(session, archive, each, actor)
            except IntegrityError as error:
                names = ", ".join(repr(each.collection["name"]) for each in staged)
                raise conflict(
                    f"A collection with one of these names is there already: {names}. Delete it first, or import "
                    "somewhere else. Nothing was changed.",
                    code="collection_exists",
                ) from error

    def _add_rows(self, session: Session, archive: ArchiveReader, staged: _Staged, actor: str) -> None:
        collection = staged.collection
        row = session.get_one(Collection, collection["id"])
        row.deleted_at = None
        session.flush()
        session.add_all(
            CollectionReader(collection_id=row.id, reader_id=reader) for reader in self._known_readers(collection)
        )
        if collection["vector_store"] is not None:
            session.add(VectorStoreInfo(collection_id=row.id, **collection["vector_store"]))
        for document in collection["documents"]:
            version = document["version"]
            session.add(
                Document(
                    id=document["id"],
                    collection_id=row.id,
                    name=document["name"],
                    owner_id=actor,
                    active_version_id=version["id"],
                    has_own_readers=document["has_own_readers"],
                    source=document["source"],
                    origin=document["origin"],
                    created_at=_time(document["created_at"]),
                )
            )
            session.flush()
            text = archive.read(f"{row.id}/{version['id']}/text.txt")
            session.add(
                Version(
                    id=version["id"],
                    document_id=document["id"],
                    state="active",
                    text_zlib=zlib.compress(text, 6),
                    pages=version["pages"],
                    created_at=_time(version["created_at"]),
                    **{name: version[name] for name in _VERSION_FIELDS},
                )
            )
            if document["has_own_readers"]:
                known = self._known_readers(document)
                session.add_all(DocumentReader(document_id=document["id"], reader_id=each) for each in known)

    def _undo(self, staged: Sequence[_Staged]) -> None:
        with self._journal.turn:
            for each in staged:
                self._store.delete_collection(each.index_id)
                self._originals.remove(document["version"]["id"] for document in each.collection["documents"])
            with self._database.write() as session:
                ids = [each.collection["id"] for each in staged]
                hidden = (Collection.id.in_(ids), Collection.deleted_at.is_not(None))
                session.execute(delete(Collection).where(*hidden))


@dataclass(frozen=True, slots=True)
class _Staged:
    collection: Json
    index_id: str

    def hidden_row(self, actor: str, tenant: str) -> Collection:
        """Deleted as far as anybody can see; a start that finds it sweeps it with its index."""
        described = self.collection
        return Collection(
            id=described["id"],
            name=described["name"],
            description=described["description"],
            owner_id=actor,
            tenant=tenant,
            index_id=self.index_id,
            embedding_model=described["embedding_model"],
            embedding_dimension=described["embedding_dimension"],
            tuning=described["tuning"],
            created_at=_time(described["created_at"]),
            deleted_at=utc_now(),
        )


def sweep_unfinished(database: Database, store: VectorStore) -> int:
    """After the journal is empty, a deleted collection is one whose import was killed. Returns how many there were."""
    with database.read() as session:
        left = session.scalars(select(Collection).where(Collection.deleted_at.is_not(None))).all()
    for collection in left:
        store.delete_collection(collection.index_id)
        with database.write() as session:
            session.execute(delete(Collection).where(Collection.id == collection.id))
    return len(left)


def _collection_json(session: Session, collection: Collection) -> Json:
    row = session.get_one(Collection, collection.id)
    info = session.get(VectorStoreInfo, collection.id)
    readers = select(CollectionReader.reader_id).where(CollectionReader.collection_id == collection.id)
    return {
        "id": row.id,
        "name": row.name,
        "description": row.description,
        "embedding_model": row.embedding_model,
        "embedding_dimension": row.embedding_dimension,
        "created_at": row.created_at.isoformat(),
        "tuning": row.tuning,
        "readers": list(session.scalars(readers)),
        "vector_store": {"name": info.name, "attributes": info.attributes} if info is not None else None,
    }


def _readers(session: Session, document: Document) -> Sequence[str]:
    rows = select(DocumentReader.reader_id).where(DocumentReader.document_id == document.id)
    return session.scalars(rows).all()


def _checked(archive: ArchiveReader, name: str) -> Json:
    """What is used of a collection's description; the checksums say that it is as it was written."""
    described = archive.read_json(name)
    try:
        documents = described["documents"]
        ids = [described["id"], *(d["id"] for d in documents), *(d["version"]["id"] for d in documents)]
        is_sound = (
            name == f"{described['id']}/collection.json"
            and len(set(ids)) == len(ids)
            and all(isinstance(each, str) and each.replace("_", "").replace("-", "").isalnum() for each in ids)
            and all(isinstance(described[key], str) for key in ("name", "description", "embedding_model"))
            and isinstance(described["embedding_dimension"], int)
        )
    except (KeyError, TypeError) as error:
        raise invalid(f"{name[:80]} lacks {error}.", param="file", code="damaged_archive") from error
    if not is_sound:
        raise invalid(f"{name[:80]} does not describe a collection.", param="file", code="damaged_archive")
    return dict(described)


def _check_model(collection: Json, model: RunningModel) -> None:
    if (collection["embedding_model"], collection["embedding_dimension"]) != (model.name, model.dimension):
        raise conflict(
            f"The collection {collection['name']!r} was embedded with {collection['embedding_model']} (dimension "
            f"{collection['embedding_dimension']}), but {model.name} (dimension {model.dimension}) runs here: nothing "
            "would be found. Start the same embedding model here, or embed the collection anew before the export "
            "(`windfarm reembed`).",
            code="embedding_mismatch",
        )


def _chunks(places: Sequence[Json], text: str, index_id: str, document: Json) -> list[StoredChunk]:
    version = document["version"]
    chunks = []
    for fields in places:
        place = Place(**(fields | {"headings": tuple(fields["headings"])}))
        if not 0 <= place.start <= place.end <= len(text):
            raise invalid(f"A passage of {document['name']!r} lies outside its text.", code="damaged_archive")
        chunks.append(
            StoredChunk(
                chunk_id=point_id(version["id"], place.index),
                collection_id=index_id,
                document_id=document["id"],
                version_id=version["id"],
                document_name=document["name"],
                text=text[place.start : place.end],
                **asdict(place) | {"headings": place.headings},
            )
        )
    return chunks


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _is_there(name: str) -> ApiError:
    return conflict(
        f"The collection {name!r} or a document of it is here already. Delete it first, or import somewhere else.",
        code="collection_exists",
    )
