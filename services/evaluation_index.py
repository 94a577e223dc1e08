"""A test set as the product would hold it: cut, embedded and stored by its own code, in a temporary folder.

A document of the set is taken as a Markdown file with its title as heading, so each passage has the title as context.
The folder is removed when the index is closed, however that comes; no collection of the user is touched.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid5

from rag.access import CollectionGrant, Reader, StoreAsSeenBy, label_points
from rag.chunking import TokenSpans
from rag.errors import StoreError
from rag.judged_set import JudgedDocument, JudgedSet
from rag.language import detect_language
from rag.tokens import load_token_spans
from rag.types import Embedder, ParsedDocument, StoredChunk, TextChunk, Vectors
from rag.vector_store import POINT_NAMESPACE, VectorStore, open_vector_store
from services.config import EmbeddingConfig, IngestionConfig
from services.database import Version
from services.environment import SECRET_VARIABLE, read_environment
from services.evaluation_settings import EvaluationSettings
from services.passage_writer import chunk_size_problem, cut_into_chunks, embedded_text, stored_chunk
from services.setup_errors import ConfigError

INDEX = "evaluation"
_JUDGE = Reader("evaluation")
_GRANT = CollectionGrant(INDEX, owner_id=_JUDGE.user_id)
"""The set belongs to whoever evaluates, and its search carries the filter of any other."""
_BATCH = 32

Report = Callable[[str, int, int], None]
"""What is being done, how much of it is done, of how much."""


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """An embedder with what cutting needs to know of it: its tokens and how many it reads."""

    embedder: Embedder
    token_spans: TokenSpans
    max_tokens: int


OpenModel = Callable[[EmbeddingConfig], AbstractAsyncContextManager[EmbeddingModel]]


@dataclass(frozen=True, slots=True)
class SearchableSet:
    """A stored set and its questions' vectors. `embedding_ms`: what each question's vector took, in their order."""

    store: StoreAsSeenBy
    model_name: str
    num_passages: int
    indexing_s: float
    vectors: dict[str, Vectors]
    embedding_ms: tuple[float, ...]
    embedder: Embedder


@asynccontextmanager
async def open_serving_model(config: EmbeddingConfig) -> AsyncIterator[EmbeddingModel]:
    """The embedding service as its deployment runs it, its model made ready on this machine first."""
    from services.embedding_service import EmbeddingService, open_configured_embedding

    # Nothing listens here, so the secret that the environment must hold is nobody's.
    environment = read_environment({**os.environ, SECRET_VARIABLE: secrets.token_hex(16)})
    opened = await asyncio.to_thread(open_configured_embedding, config, environment)
    service = EmbeddingService(opened, max_batch=config.max_batch, batch_wait_ms=config.batch_wait_ms)
    try:
        await service.start()
        described = await service.describe()
        token_spans = load_token_spans(Path(described["tokenizer_file"]))
        yield EmbeddingModel(service, token_spans, int(described["max_tokens"]))
    finally:
        await service.close()


@asynccontextmanager
async def open_index(
    judged: JudgedSet, settings: EvaluationSettings, open_model: OpenModel, report: Report
) -> AsyncIterator[SearchableSet]:
    """Index a set. Raises `ConfigError` where the model cannot read passages of that size, and `StoreError`."""
    report("loading the embedding model", 0, 1)
    with _temporary_folder() as folder:
        async with open_model(settings.embed) as model:
            if problem := chunk_size_problem(settings.ingestion, model.embedder.model_name, model.max_tokens):
                raise ConfigError(problem)
            store = open_vector_store(Path(folder) / "vectors")
            try:
                began = time.perf_counter()
                num_passages = await _store_documents(judged.documents, store, model, settings.ingestion, report)
                indexing_s = time.perf_counter() - began
                vectors, embedding_ms = await _embed_queries(judged, model.embedder, report)
                seen = StoreAsSeenBy(_JUDGE, store, (_GRANT,))
                embedder = model.embedder
                yield SearchableSet(
                    seen, embedder.model_name, num_passages, indexing_s, vectors, embedding_ms, embedder
                )
            finally:
                await asyncio.shield(asyncio.to_thread(store.close))


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="windfarm-eval-")
    except OSError as error:
        raise StoreError(
            f"No temporary folder can be made: {error.strerror or error}. Free some space, or name another place with "
            "TMPDIR."
        ) from error


async def _store_documents(
    documents: Sequence[JudgedDocument],
    store: VectorStore,
    model: EmbeddingModel,
    config: IngestionConfig,
    report: Report,
) -> int:
    """Returns the number of passages. Documents are embedded together: alone most would not fill a batch."""
    labels = label_points(_GRANT.tenant, None)
    passages = await asyncio.to_thread(cut_documents, documents, model.token_spans, config)
    for start in range(0, len(passages), _BATCH):
        report("embedding passages", start, len(passages))
        batch = passages[start : start + _BATCH]
        vectors = await model.embedder.embed_passages([embedded_text(chunk) for chunk, _ in batch])
        stored = [chunk for _, chunk in batch]
        await asyncio.to_thread(store.upsert, INDEX, stored, vectors, active=True, labels=labels)
    await asyncio.to_thread(store.optimize)
    return len(passages)


def cut_documents(
    documents: Sequence[JudgedDocument], token_spans: TokenSpans, config: IngestionConfig
) -> list[tuple[TextChunk, StoredChunk]]:
    """The passages of a set: as they are embedded, and as they are stored."""
    passages = []
    for document in documents:
        parsed = _as_parsed(document)
        version = _version(document.id, parsed)
        for chunk in cut_into_chunks(parsed, token_spans, config):
            passages.append((chunk, stored_chunk(chunk, INDEX, version, document.id)))
    return passages


def texts_of_versions(documents: Sequence[JudgedDocument]) -> dict[str, str]:
    """The stored text of each document by the id of its version: what citations point into."""
    parsed = ((document.id, _as_parsed(document)) for document in documents)
    return {_version(identity, text).id: text.text for identity, text in parsed}


def _as_parsed(document: JudgedDocument) -> ParsedDocument:
    title = " ".join(document.title.split())
    text = f"# {title}\n\n{document.text}" if title else document.text
    return ParsedDocument(text, "text/markdown", title=title or None, language=detect_language(text))


def _version(document_id: str, parsed: ParsedDocument) -> Version:
    # Equal scores are ranked by version id: one that follows the order of the file would favour sets which list
    # relevant documents first.
    identity = str(uuid5(POINT_NAMESPACE, document_id))
    return Version(id=identity, document_id=document_id, title=parsed.title, language=parsed.language)


async def _embed_queries(
    judged: JudgedSet, embedder: Embedder, report: Report
) -> tuple[dict[str, Vectors], tuple[float, ...]]:
    """One by one, as people ask."""
    vectors: dict[str, Vectors] = {}
    took_ms = []
    for position, query in enumerate(judged.queries):
        report("embedding questions", position, len(judged.queries))
        began = time.perf_counter()
        vectors[query.text] = (await embedder.embed_queries([query.text]))[0]
        took_ms.append(1000 * (time.perf_counter() - began))
    return vectors, tuple(took_ms)
