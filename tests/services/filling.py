"""Documents put straight into database and vector store, through the journal: no upload and no parser process."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

from rag.chunking import chunk_document
from rag.language import detect_language
from rag.types import ParsedDocument
from rag.vector_store import VectorStore
from services.database import Collection, Database, Job, Version, new_id
from services.journal import Journal, Replacement
from services.passage_writer import embedded_text, stored_chunk
from tests.services.ingesting import HashEmbedder, word_spans


def add_document(
    database: Database,
    store: VectorStore,
    journal: Journal,
    collection: Collection,
    name: str,
    text: str,
    dimension: int,
) -> str:
    """The id of a new document with these words. `dimension`: of the collection's vectors."""
    language = detect_language(text)
    version = Version(
        id=new_id("ver"),
        document_id=new_id("doc"),
        content_sha256=hashlib.sha256(text.encode()).hexdigest(),
        num_bytes=len(text.encode()),
        mime_type="text/plain",
        language=language,
        num_characters=len(text),
        state="staged",
        text_zlib=zlib.compress(text.encode()),
        pages=[],
    )
    chunks = chunk_document(ParsedDocument(text, "text/plain", language=language), word_spans, 64, 8)
    version.num_chunks = len(chunks)
    embedder: Any = HashEmbedder(dimension=dimension)
    vectors = embedder.vectors([embedded_text(chunk) for chunk in chunks])
    stored = [stored_chunk(chunk, collection.index_id, version, name) for chunk in chunks]
    job = Job(
        id=new_id("job"), collection_id=collection.id, owner_id=collection.owner_id, filename=name, state="embedding"
    )
    with database.write() as session:
        session.add(job)
    with journal.turn:
        store.upsert(collection.index_id, stored, vectors, active=False)
        change = Replacement(job.id, collection.id, collection.index_id, version, name, collection.owner_id)
        assert journal.activate(change), "its collection is there"
    return version.document_id
