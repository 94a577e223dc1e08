"""A large collection for measurements of speed: passages mixed from the sentences of the question sets, with synthetic
vectors, written as an export that `windfarm kb import` takes. Always the same for the same seed.

A vector is that of a real passage with noise, so that vectors lie as close together as real ones do. The words are
those of real text, so that word lists are as long as in real collections, or longer: there are fewer different ones.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from rag.sentences import split_sentences
from rag.types import Vectors
from rag.vector_store import Place
from services.archive import ArchiveWriter
from services.knowledge_transfer import KIND

PASSAGES_PER_DOCUMENT = 50
_PASSAGE_CHARACTERS = 800
_NOISE = 0.5
"""Length of the noise beside a vector of length 1."""
_OWN_READERS = 0.4
"""Share of documents that have readers of their own: two groups each."""


@dataclass(frozen=True)
class Model:
    """The embedding model that runs, as a collection remembers it."""

    name: str
    dimension: int


@dataclass(frozen=True)
class Content:
    """Sentences by language, and real vectors (n, dimension) to make others from."""

    sentences: dict[str, list[str]]
    vectors: Vectors


def read_sentences(sets: Sequence[Path]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for folder in sets:
        texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text("utf-8").splitlines()]
        found[folder.name] = [text[span.start : span.end] for text in texts for span in split_sentences(text)]
    return found


def make_passages(content: Content, num_passages: int, seed: int = 0) -> tuple[list[str], Vectors]:
    """Texts of about 200 tokens, those of a document in one language, and their vectors."""
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    languages = sorted(content.sentences)
    texts = [
        _passage(draw, content.sentences[languages[number // PASSAGES_PER_DOCUMENT % len(languages)]], number)
        for number in range(num_passages)
    ]
    base = content.vectors[noise.integers(len(content.vectors), size=num_passages)]
    away = noise.standard_normal(base.shape, dtype=np.float32)
    vectors = base + _NOISE * away / np.linalg.norm(away, axis=1, keepdims=True)
    return texts, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _passage(draw: random.Random, sentences: list[str], number: int) -> str:
    chosen = [f"Note {number}."]
    while sum(map(len, chosen)) < _PASSAGE_CHARACTERS:
        chosen.append(draw.choice(sentences))
    return " ".join(chosen)


def write_export(
    path: Path,
    name: str,
    texts: Sequence[str],
    vectors: Vectors,
    model: Model,
    languages: Sequence[str],
    groups: Sequence[str],
) -> None:
    """`groups`: ids; the first one reads the collection, the others own readers of documents in it."""
    collection_id = f"col_{name}"
    now = datetime.now(UTC).isoformat()
    draw = random.Random(name)
    with ArchiveWriter(path, KIND) as archive:
        documents = []
        for number, start in enumerate(range(0, len(texts), PASSAGES_PER_DOCUMENT)):
            part = slice(start, start + PASSAGES_PER_DOCUMENT)
            language = sorted(languages)[number % len(languages)]
            document = _document(f"{name}_{number}", texts[part], language, now)
            if draw.random() < _OWN_READERS:
                document |= {"has_own_readers": True, "readers": draw.sample(list(groups), 2)}
            folder = f"{collection_id}/{document['version']['id']}"
            archive.add_bytes(f"{folder}/text.txt", "\n\n".join(texts[part]).encode())
            archive.add_json(f"{folder}/places.json", [asdict(each) for each in _places(texts[part], language)])
            archive.add_vectors(f"{folder}/vectors.f32", vectors[part])
            documents.append(document)
        described = {
            "id": collection_id,
            "name": name,
            "description": "",
            "embedding_model": model.name,
            "embedding_dimension": model.dimension,
            "created_at": now,
            "tuning": None,
            "readers": [groups[0]],
            "vector_store": None,
            "documents": documents,
        }
        archive.add_json(f"{collection_id}/collection.json", described)


def _document(identity: str, texts: Sequence[str], language: str, now: str) -> dict[str, Any]:
    text = "\n\n".join(texts)
    version = {
        "id": f"ver_{identity}",
        "content_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_bytes": len(text.encode()),
        "mime_type": "text/plain",
        "title": None,
        "language": language,
        "num_chunks": len(texts),
        "num_characters": len(text),
        "pages": [],
        "created_at": now,
    }
    return {
        "id": f"doc_{identity}",
        "name": f"{identity}.txt",
        "created_at": now,
        "has_own_readers": False,
        "readers": [],
        "source": None,
        "origin": None,
        "version": version,
    }


def _places(texts: Sequence[str], language: str) -> Iterator[Place]:
    start = 0
    for index, text in enumerate(texts):
        yield Place(index, start, start + len(text), language=language)
        start += len(text) + len("\n\n")
