"""What windfarm's retrieval is measured beside, in its own process: the bare embedding engine, and a plain pipeline of
LangChain and `qdrant-client` in local mode. Both use one engine: windfarm's model, precision, batch and threads.

Reads one JSON object per line and answers with one: `embed` (the bare engine), `ingest` and `search` (the pipeline),
`load` (fills the pipeline with texts whose vectors are known). Runs in an environment with LangChain's packages.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.embeddings import Embeddings

from cluster.engines.embedding_choice import OpenedEmbedding
from services.config import EmbeddingConfig, Environment
from services.embedding_service import open_configured_embedding

if TYPE_CHECKING:
    from rag.types import Vectors

BATCH = 32


class EngineEmbeddings(Embeddings):
    """The engine behind LangChain's interface. `known`: vectors that need not be computed, by their texts."""

    def __init__(self, model: OpenedEmbedding) -> None:
        self._model = model
        self.known: dict[str, Any] = {}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if self.known:
            return [self.known[text].tolist() for text in texts]
        return [row for batch in _batches(texts) for row in self.vectors(batch, "passage").tolist()]

    def embed_query(self, text: str) -> list[float]:
        vector: list[float] = self.vectors([text], "query")[0].tolist()
        return vector

    def vectors(self, texts: Sequence[str], kind: str) -> Vectors:
        prefix = self._model.spec.prefixes.get(kind, "")
        inputs = self._model.tokenizer.encode(texts, prefix)
        return self._model.engine.embed([each.token_ids for each in inputs])


class Pipeline:
    """Split, embed, store; embed, search: as LangChain's documentation shows it."""

    def __init__(self, model: OpenedEmbedding, chunk_tokens: int, overlap_tokens: int) -> None:
        from langchain_text_splitters import RecursiveCharacterTextSplitter

        self.embeddings = EngineEmbeddings(model)
        self._length = model.tokenizer
        self._splitter = RecursiveCharacterTextSplitter(
            chunk_size=chunk_tokens, chunk_overlap=overlap_tokens, length_function=self._num_tokens
        )
        self._dimension = model.engine.dimension
        self._store: Any = None

    def begin(self, folder: Path) -> None:
        """An empty store in a folder."""
        from langchain_qdrant import QdrantVectorStore
        from qdrant_client import QdrantClient
        from qdrant_client.models import Distance, VectorParams

        if self._store is not None:
            self._store.client.close()
        client = QdrantClient(path=str(folder))
        client.create_collection("bench", vectors_config=VectorParams(size=self._dimension, distance=Distance.COSINE))
        self._store = QdrantVectorStore(client=client, collection_name="bench", embedding=self.embeddings)

    def ingest(self, files: Sequence[str]) -> int:
        """The number of passages."""
        num_passages = 0
        for file in files:
            passages = self._splitter.split_text(Path(file).read_text("utf-8"))
            metadata = [{"source": file, "index": index} for index in range(len(passages))]
            self._store.add_texts(passages, metadata, batch_size=BATCH)
            num_passages += len(passages)
        return num_passages

    def load(self, texts: Sequence[str], vectors: Vectors) -> None:
        self.embeddings.known = dict(zip(texts, vectors, strict=True))
        self._store.add_texts(texts, [{"source": f"{number // 50}"} for number in range(len(texts))], batch_size=1000)
        self.embeddings.known = {}

    def search(self, query: str, top_k: int) -> int:
        return len(self._store.similarity_search(query, k=top_k))

    def _num_tokens(self, text: str) -> int:
        return len(self._length.encode([text])[0].token_ids) - 2  # without the special tokens at both ends


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), BATCH):
        yield texts[start : start + BATCH]


def answer(pipeline: Pipeline, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    match asked["do"]:
        case "vectors":
            rows = [pipeline.embeddings.vectors(batch, "passage") for batch in _batches(asked["texts"])]
            np.save(asked["into"], np.concatenate(rows))
            return {}
        case "embed":
            began = time.perf_counter()
            for batch in _batches(asked["texts"]):
                pipeline.embeddings.vectors(batch, "passage")
            return {"seconds": time.perf_counter() - began}
        case "ingest":
            pipeline.begin(Path(tempfile.mkdtemp(dir=folder)))
            began = time.perf_counter()
            num_passages = pipeline.ingest(asked["files"])
            return {"seconds": time.perf_counter() - began, "num_passages": num_passages}
        case "load":
            pipeline.begin(Path(tempfile.mkdtemp(dir=folder)))
            pipeline.load(json.loads(Path(asked["texts"]).read_text("utf-8")), np.load(asked["vectors"]))
            return {}
        case "search":
            milliseconds = []
            for query in asked["queries"]:
                began = time.perf_counter()
                pipeline.search(query, asked["top_k"])
                milliseconds.append(1000 * (time.perf_counter() - began))
            return {"milliseconds": milliseconds}
    raise ValueError(f"unknown: {asked['do']}")


def main() -> None:
    config = json.loads(sys.argv[1])
    environment = Environment(home=Path(config["home"]), database_url="none", internal_secret="none")
    model = open_configured_embedding(EmbeddingConfig(**config["embed"]), environment)
    pipeline = Pipeline(model, config["chunk_tokens"], config["overlap_tokens"])
    described = {"backend": model.engine.backend, "threads": model.threads, "model": model.identity}
    with tempfile.TemporaryDirectory(prefix="windfarm-bench-") as folder:
        print(json.dumps(described), flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(pipeline, json.loads(line), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
