"""Tuning a collection through the store: its own threshold and fusion, kept, used by searches, and gone when asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli.tuning import describe_tuning, read_far, read_questions
from services.config import RetrievalConfig
from services.errors import ApiError
from services.self_questions import make_questions
from services.setup_errors import ConfigError
from services.store_service import StoreService
from services.tuning import is_valid, tuned_fusion
from tests.services.ingesting import OWNER
from tests.services.test_store_service import ingest, opened

PLAIN = RetrievalConfig()
TOPICS = ["leave", "hotel", "train", "phone", "desk"]
PLACES = ["Berlin", "Paris", "Rome", "Madrid"]
FOODS = ["fish", "grass", "leaves", "bread", "seeds", "honey", "nuts", "corn", "plums", "hay"]
FAR = [f"Which {animal} eats {food}?" for animal in ("tiger", "whale", "parrot", "snake") for food in FOODS]


async def fill(service: StoreService) -> list[tuple[str, list[str]]]:
    """One document for each topic and place; questions with the ids of their documents."""
    await service.create_collection("handbook", "", OWNER)
    questions = []
    for topic in TOPICS:
        for place in PLACES:
            text = (
                f"The {topic} office of {place} answers within {len(topic + place)} days in the {topic} building. "
                f"Anna Keller opened the {topic} office of {place} in 1990. It has 12 rooms on two floors for {topic}."
            )
            identity = await ingest(service, "handbook", f"{topic}-{place}.md", text)
            for asked in ("Where is the {} office of {}?", "When does the {} office of {} answer?", "{} office {}"):
                questions.append((asked.format(topic, place), [identity]))
    return questions


async def test_a_collection_is_tuned_used_so_and_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path) as service:
        questions = await fill(service)
        tuned = await service.tune("handbook", questions + [(text, []) for text in FAR], OWNER, retrieval=PLAIN)
        tuning = tuned["tuning"]
        assert tuning["num_questions"] == 100 and tuning["source"] == "questions"
        assert tuning["errors"]["wrong_refusals"] <= 0.10 and tuning["errors"]["wrong_answers_far"] <= 0.05
        assert 0 <= tuning["errors"]["wrong_answers_near"] <= 1
        assert len(tuning["curve"]) > 5 and tuning["fusion"] in ("rrf", "minmax", "dbsf")
        assert (await service.collection("handbook", OWNER))["tuning"] == tuning
        assert any("judged" in line.lower() for line in describe_tuning(tuning))

        found = await service.search(["handbook"], "Where is the desk office of Rome?", 3, OWNER)
        (index_id,) = found.collection_names
        assert found.thresholds == {index_id: tuning["evidence_threshold"]}

        assert (await service.forget_tuning("handbook", OWNER))["tuning"] is None
        found = await service.search(["handbook"], "Where is the desk office of Rome?", 3, OWNER)
        assert found.thresholds == {}

        # The threshold is of what answers see: with a reranker that likes the worst passage best, of that one.
        unlucky = RetrievalConfig(rerank="embed", top_k=1, rerank_candidates=PLAIN.candidates)
        reranked = await service.tune("handbook", questions + [(text, []) for text in FAR], OWNER, retrieval=unlucky)
        assert reranked["tuning"]["evidence_threshold"] < tuning["evidence_threshold"] - 0.1

        # Without questions they are made from the collection itself, far ones from the others.
        await service.create_collection("zoo", "", OWNER)
        told = " ".join(
            f"The {animal} number {number} eats {food} in Hall {number}."
            for number, food in enumerate(FOODS, start=3)
            for animal in ("Seal", "Bear", "Wolf", "Crane")
        )
        await ingest(service, "zoo", "animals.md", told)
        made = (await service.tune("handbook", None, OWNER, retrieval=PLAIN))["tuning"]
        assert made["source"] == "collection" and made["fusion"] is None
        assert made["errors"]["wrong_answers_far"] is not None


async def test_a_search_joins_its_legs_as_the_collection_was_tuned_to(tmp_path: Path) -> None:
    """The words leg knows inflected words, the embedder of the tests only equal ones: each likes another passage."""
    async with opened(tmp_path) as service:
        await service.create_collection("handbook", "", OWNER)
        by_words = await ingest(service, "handbook", "a.md", "The office runs.")
        by_meaning = await ingest(service, "handbook", "b.md", "Which offices? None.")
        for weight, wanted in ((0.0, by_words), (1.0, by_meaning)):
            tuning = {"embedding_model": "hash", "evidence_threshold": 0.5, "fusion": "minmax", "dense_weight": weight}
            service._knowledge.keep_tuning("handbook", tuning, OWNER)
            found = await service.search(["handbook"], "Which offices run?", 1, OWNER, dense_weight=1.0 - weight)
            assert [passage.chunk.document_id for passage in found.passages] == [wanted], weight


async def test_too_few_and_unknown_are_refused_with_the_next_step(tmp_path: Path) -> None:
    async with opened(tmp_path) as service:
        await service.create_collection("handbook", "", OWNER)
        identity = await ingest(service, "handbook", "a.md", "The desk office of Rome.")
        with pytest.raises(ApiError, match=r"handbook cannot be tuned: .*too few"):
            await service.tune("handbook", [("Where is the desk?", [identity])], OWNER, retrieval=PLAIN)
        with pytest.raises(ApiError, match="no document 'doc_x'"):
            await service.tune("handbook", [("Where is the desk?", ["doc_x"])], OWNER, retrieval=PLAIN)
        with pytest.raises(ApiError, match="There is no collection named"):
            await service.tune("nothing", None, OWNER, retrieval=PLAIN)
        assert (await service.collection("handbook", OWNER))["tuning"] is None


def test_a_tuning_of_another_embedding_model_does_not_hold() -> None:
    tuning = {"embedding_model": "e5", "fusion": "rrf", "dense_weight": 0.4}
    assert is_valid(tuning, "e5") and tuned_fusion(tuning, "e5") == ("rrf", 0.4)
    assert not is_valid(tuning, "other") and tuned_fusion(tuning, "other") is None
    assert tuned_fusion(None, "e5") is None


def test_made_questions_are_words_of_sentences_that_tell_something() -> None:
    text = (
        "Hello there. The Aldermoor Bridge was opened in 1931 by Lady Harcourt. It is nice here for all of us people."
    )
    made = make_questions([("doc_1", text)])
    assert [question.text for question in made] == ["aldermoor bridge opened 1931 lady harcourt"]
    assert made[0].documents == {"doc_1"}
    assert make_questions([("doc_1", text)]) == made
    assert make_questions([]) == make_questions([("d", "")]) == []


def write_set(folder: Path, document: str) -> Path:
    folder.mkdir()
    (folder / "corpus.jsonl").write_text(json.dumps({"_id": document, "title": "", "text": "Text."}), "utf-8")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "How long?"}), "utf-8")
    (folder / "qrels.tsv").write_text(f"q\t{document}\t1", "utf-8")
    return folder


def test_document_ids_of_a_set_are_file_names_with_or_without_ending(tmp_path: Path) -> None:
    documents = [{"id": "doc_1", "name": "leave.md"}]
    for number, name in enumerate(("leave", "leave.md")):
        folder = write_set(tmp_path / str(number), name)
        assert read_questions(folder, documents, "handbook") == [{"text": "How long?", "documents": ["doc_1"]}]
    with pytest.raises(ConfigError, match="handbook has no document 'other'"):
        read_questions(write_set(tmp_path / "x", "other"), documents, "handbook")
    assert read_far(tmp_path / "0") == [{"text": "How long?", "documents": []}]
    with pytest.raises(ConfigError, match="cannot be read as questions"):
        read_far(tmp_path / "missing")
