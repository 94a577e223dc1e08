from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from langchain_core.retrievers import BaseRetriever

from rag.retriever import HybridRetriever, RetrievalSettings, rank, retrieve, to_document, to_passage
from rag.types import Passage, StoredChunk, Vectors
from rag.vector_store import ScoredChunk, VectorStore, open_vector_store
from tests.seen import LABELS, seen

TOPICS = ["holiday", "travel", "security", "kitchen"]


class TopicEmbedder:
    """Turns a text into the topics that it names: meaning that a test can foresee."""

    model_name = "topics"
    dimension = len(TOPICS) + 1

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        rows = np.array(
            [[float(topic in text.lower()) for topic in TOPICS] + [0.5] for text in texts], dtype=np.float32
        )
        normalised: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return normalised

    embed_passages = embed_queries


def chunk(text: str, *, collection: str, index: int) -> StoredChunk:
    return StoredChunk(f"{collection}-{index}", collection, "d", f"v-{collection}", "h.md", text, 0, 9, index)


@pytest.fixture
async def store(tmp_path: Path) -> Iterator[VectorStore]:  # type: ignore[misc]
    made = open_vector_store(tmp_path / "vectors")
    texts = {
        "a": ["Holiday is 25 days", "Travel by train", "The holiday form is F-17", "Kitchen rules"],
        "b": ["Security badge numbers", "Holiday in the other office"],
    }
    for collection, entries in texts.items():
        chunks = [chunk(text, collection=collection, index=index) for index, text in enumerate(entries)]
        made.upsert(collection, chunks, await TopicEmbedder().embed_passages(entries), active=True, labels=LABELS)
    yield made  # type: ignore[misc]
    made.close()


async def search(store: VectorStore, query: str, *collections: str, top_k: int = 2) -> list[str]:
    settings = RetrievalSettings(top_k=top_k)
    both = seen(store, "a", "b")
    passages = await retrieve(query, collections, embedder=TopicEmbedder(), store=both, settings=settings)
    return [passage.chunk.text for passage in passages]


async def test_both_legs_decide_together(store: VectorStore) -> None:
    assert (await search(store, "form F-17 for holiday", "a"))[0] == "The holiday form is F-17"


async def test_a_search_spans_the_chosen_collections_and_no_other(store: VectorStore) -> None:
    assert set(await search(store, "holiday", "a", "b", top_k=3)) == {
        "Holiday is 25 days",
        "The holiday form is F-17",
        "Holiday in the other office",
    }
    assert await search(store, "security", "a", top_k=1) != ["Security badge numbers"]


async def test_each_passage_tells_the_score_of_each_leg(store: VectorStore) -> None:
    settings = RetrievalSettings(top_k=4)
    passages = await retrieve("travel", ["a"], embedder=TopicEmbedder(), store=seen(store, "a", "b"), settings=settings)
    assert passages[0].chunk.text == "Travel by train"
    assert passages[0].leg_scores["dense"] == pytest.approx(1.0, abs=1e-3)
    assert passages[0].leg_scores["bm25"] > 0
    assert "bm25" not in passages[-1].leg_scores
    assert [p.score for p in passages] == sorted((p.score for p in passages), reverse=True)


@pytest.mark.parametrize(("query", "collections"), [("", ("a",)), ("  ", ("a",)), ("holiday", ()), ("holiday", ("x",))])
async def test_nothing_to_search_finds_nothing(store: VectorStore, query: str, collections: tuple[str, ...]) -> None:
    assert await search(store, query, *collections) == []


def test_equal_scores_are_ranked_the_same_way_every_time() -> None:
    hits = [ScoredChunk(chunk("same", collection="a", index=index), 0.8, 1.0) for index in range(6)]
    forth = [p.chunk.index for p in rank(hits, RetrievalSettings(top_k=3))]
    back = [p.chunk.index for p in rank(hits[::-1], RetrievalSettings(top_k=3))]
    assert forth == back == [0, 1, 2]


async def test_langchain_gets_documents_with_what_a_citation_needs(store: VectorStore) -> None:
    retriever = HybridRetriever(collection_ids=["a"], embedder=TopicEmbedder(), store=seen(store, "a"))
    assert isinstance(retriever, BaseRetriever)
    first = (await retriever.ainvoke("travel"))[0]
    assert first.page_content == "Travel by train"
    assert {"document_id", "version_id", "start", "end", "score", "dense_score", "bm25_score"} <= first.metadata.keys()


def test_a_passage_survives_its_way_through_langchain() -> None:
    found = StoredChunk(
        "i", "c", "d", "v", "h.md", "text", 3, 7, 2, page=4, title="T", headings=("A", "B"), language="en"
    )
    for passage in (
        Passage(found, 0.5, {"dense": 0.9, "bm25": 2.5}),
        Passage(chunk("plain", collection="a", index=0), 0.1, {}),
    ):
        assert to_passage(to_document(passage)) == passage


def test_langchain_works_without_an_event_loop_too(tmp_path: Path) -> None:
    store = open_vector_store(tmp_path / "vectors")
    vectors = np.eye(5, dtype=np.float32)[:1]
    store.upsert("a", [chunk("Holiday is 25 days", collection="a", index=0)], vectors, active=True, labels=LABELS)
    retriever = HybridRetriever(collection_ids=["a"], embedder=TopicEmbedder(), store=seen(store, "a"))
    assert [document.page_content for document in retriever.invoke("holiday")] == ["Holiday is 25 days"]
    store.close()
