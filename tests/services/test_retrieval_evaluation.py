"""Evaluation of retrieval with the real store and an embedder that needs no model: the product's rankings, judged."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rich.console import Console

from rag.errors import StoreError
from rag.judged_set import JudgedDocument, JudgedQuery, JudgedSet, read_judged_set
from rag.ranking_metrics import ndcg, rank_documents
from rag.retriever import RetrievalSettings, retrieve
from services.config import AppConfig, EmbeddingConfig
from services.evaluation_index import EmbeddingModel, OpenModel
from services.evaluation_settings import EvaluationSettings
from services.evaluation_view import evaluation_json, print_evaluation
from services.retrieval_evaluation import LEGS, Measurement, evaluate
from services.setup_errors import ConfigError
from tests.seen import seen
from tests.services.ingesting import CONFIG, OWNER, HashEmbedder, running, word_spans

DATA = Path(__file__).parents[1] / "data" / "multilingual-qa-mini"
SETTINGS = EvaluationSettings.of(AppConfig()).with_values({"chunk_tokens": "64", "chunk_overlap_tokens": "8"})


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, so that a test can see whether one is left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def opener(embedder: HashEmbedder) -> OpenModel:
    @asynccontextmanager
    async def open_model(config: EmbeddingConfig) -> AsyncIterator[EmbeddingModel]:
        yield EmbeddingModel(embedder, word_spans, 512)

    return open_model


def judged_set(documents: dict[str, str], queries: dict[str, tuple[str, dict[str, int]]]) -> JudgedSet:
    return JudgedSet(
        Path("a set"),
        tuple(JudgedDocument(identity, "", text) for identity, text in documents.items()),
        tuple(JudgedQuery(identity, text, grades) for identity, (text, grades) in queries.items()),
        num_left_out=0,
    )


async def measure(
    judged: JudgedSet, *settings: EvaluationSettings, embedder: HashEmbedder | None = None
) -> list[Measurement]:
    return await evaluate(judged, settings or (SETTINGS,), open_model=opener(embedder or HashEmbedder()))


WINDS = judged_set(
    {
        "mistral": "The mistral is a cold wind of southern France.",
        "sirocco": "The sirocco is a hot wind from the Sahara.",
        "bora": "The bora blows down to the Adriatic coast.",
        "empty": "",
    },
    {
        "q1": ("Which cold wind blows in southern France?", {"mistral": 2, "bora": 1}),
        "q2": ("Which hot wind comes from the Sahara?", {"sirocco": 1}),
    },
)


async def test_each_leg_is_measured_for_each_question(temporary: Path) -> None:
    (measured,) = await measure(WINDS)
    assert set(measured.legs) == set(LEGS)
    assert measured.num_passages == 3, "an empty document has none"
    for scores in measured.legs.values():
        assert set(scores.metrics) == {"ndcg@10", "mrr@10", "recall@10", "recall@100"}
        assert all(len(values) == 2 for values in scores.metrics.values())
        assert len(scores.latency_ms) == 2 and min(scores.latency_ms) > 0
    assert measured.legs["sparse"].metrics["mrr@10"] == (1.0, 1.0)
    assert measured.legs["dense"].metrics["recall@10"] == (1.0, 1.0), "the meaning leg finds every passage"
    assert list(temporary.iterdir()) == []


async def test_words_that_stand_nowhere_find_nothing_in_the_sparse_leg_alone() -> None:
    judged = judged_set({"a": "holiday rules"}, {"q": ("vacation", {"a": 1})})
    (measured,) = await measure(judged)
    assert {leg: measured.legs[leg].metrics["recall@100"] for leg in LEGS} == {
        "dense": (1.0,),
        "sparse": (0.0,),
        "fused": (1.0,),
    }


async def test_the_numbers_are_those_of_documents_that_were_really_ingested(tmp_path: Path) -> None:
    """The same set through uploads, parser process, journal and store of the product gives the same nDCG."""
    whole = read_judged_set(DATA / "en")
    judged = JudgedSet(
        whole.folder, whole.documents[:12], tuple(q for q in whole.queries if _among(q, whole, 12))[:30], 0
    )
    settings = EvaluationSettings(SETTINGS.retrieval, CONFIG, SETTINGS.embed)
    (measured,) = await measure(judged, settings)
    embedder = HashEmbedder()
    async with running(tmp_path, embedder=embedder) as product:
        product.create()
        for document in judged.documents:
            job = await product.ingest("handbook", f"{document.id}.md", f"# {document.title}\n\n{document.text}")
            assert job["state"] == "done"
        index_id = product.knowledge.collection("handbook", OWNER).index_id
        names = {entry["id"]: entry["name"] for entry in product.knowledge.list_documents("handbook", OWNER)}
        wanted = RetrievalSettings(50, 50, settings.retrieval.fusion, settings.retrieval.dense_weight)
        for query, found_by_evaluation in zip(judged.queries, measured.legs["fused"].metrics["ndcg@10"], strict=True):
            store = seen(product.store, index_id)
            passages = await retrieve(query.text, [index_id], embedder=embedder, store=store, settings=wanted)
            ranking = [names[document].removesuffix(".md") for document in rank_documents(passages)]
            assert ndcg(ranking, query.judgements, 10) == pytest.approx(found_by_evaluation), query.text
        assert product.store.count(index_id) == measured.num_passages


def _among(query: JudgedQuery, judged: JudgedSet, num_documents: int) -> bool:
    return set(query.judgements) <= {document.id for document in judged.documents[:num_documents]}


async def test_recall_at_100_reaches_100_documents_behind_one_of_many_passages() -> None:
    long = " ".join(f"wind power {'turbine ' * 12} number{number}." for number in range(400))
    documents = {
        "long": long,
        "short": "A windmill has wind and four sails and a long story of grain and flour and bread.",
    }
    judged = judged_set(documents, {"q": ("wind power turbine", {"short": 1})})
    settings = SETTINGS.with_values({"chunk_tokens": "16", "chunk_overlap_tokens": "0", "candidates": "10"})
    (measured,) = await measure(judged, settings)
    assert measured.num_passages > 200
    assert measured.legs["sparse"].metrics["recall@100"] == (1.0,)
    assert measured.legs["sparse"].metrics["recall@10"] == (0.0,), "10 passages of one document come first"


async def test_a_leg_alone_is_ranked_whatever_its_weight_in_the_fusion() -> None:
    plain, only_meaning, only_words = await measure(
        WINDS, SETTINGS, SETTINGS.with_values({"dense_weight": "1"}), SETTINGS.with_values({"dense_weight": "0"})
    )
    for leg in ("dense", "sparse"):
        assert plain.legs[leg].metrics == only_meaning.legs[leg].metrics == only_words.legs[leg].metrics
    assert only_words.legs["fused"].metrics["mrr@10"] == plain.legs["sparse"].metrics["mrr@10"]


async def test_configurations_that_store_the_same_share_an_index_and_keep_their_order() -> None:
    embedder = HashEmbedder()
    finer = SETTINGS.with_values({"chunk_tokens": "16", "chunk_overlap_tokens": "0"})
    other_fusion = SETTINGS.with_values({"fusion": "rrf"})
    measured = await measure(WINDS, SETTINGS, finer, other_fusion, embedder=embedder)
    assert [each.settings for each in measured] == [SETTINGS, finer, other_fusion]
    assert embedder.num_texts == measured[0].num_passages + measured[1].num_passages


async def test_passages_that_the_model_cannot_read_are_refused(temporary: Path) -> None:
    with pytest.raises(ConfigError, match=r"chunk_tokens is 500.*at most 512 tokens.*Set it to 496 or less"):
        await measure(WINDS, SETTINGS.with_values({"chunk_tokens": "500"}))
    assert list(temporary.iterdir()) == []


async def test_a_temporary_folder_that_cannot_be_made_is_said(temporary: Path) -> None:
    temporary.rmdir()
    with pytest.raises(StoreError, match=r"No such file or directory\. Free some space, or.* TMPDIR"):
        await measure(WINDS)


class FailingEmbedder(HashEmbedder):
    async def embed_queries(self, texts):
        if texts[0].startswith("Which hot"):
            raise RuntimeError("broken")
        return await super().embed_queries(texts)


async def test_a_failure_leaves_no_folder_behind(temporary: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        await measure(WINDS, embedder=FailingEmbedder())
    assert list(temporary.iterdir()) == []


async def test_an_interruption_leaves_no_folder_behind(temporary: Path) -> None:
    embedder = HashEmbedder()
    embedder.gate.clear()
    began = asyncio.Event()

    def report(step: str, done: int, total: int) -> None:
        if step == "embedding passages":
            began.set()

    work = asyncio.create_task(evaluate(WINDS, [SETTINGS], open_model=opener(embedder), report=report))
    await began.wait()
    assert len(list(temporary.iterdir())) == 1
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert list(temporary.iterdir()) == []


async def test_scripts_get_one_object_and_people_tables() -> None:
    other = SETTINGS.with_values({"fusion": "rrf", "dense_weight": "0.5"})
    measured = await measure(WINDS, SETTINGS, other)
    answer = json.loads(json.dumps(evaluation_json(WINDS, measured)))
    assert answer["fused"]["ndcg@10"] == pytest.approx(sum(measured[0].legs["fused"].metrics["ndcg@10"]) / 2, abs=1e-5)
    assert answer["fused"]["recall@100"] == 1.0
    low, high = answer["fused"]["interval_95"]["ndcg@10"]
    assert low <= answer["fused"]["ndcg@10"] <= high
    assert answer["fused"]["latency_ms"]["p50"] <= answer["fused"]["latency_ms"]["p95"]
    assert answer["config"]["fusion"] == "dbsf" and answer["against"]["config"]["fusion"] == "rrf"
    difference = answer["difference"]["fused"]["ndcg@10"]
    assert difference["mean"] == pytest.approx(
        answer["fused"]["ndcg@10"] - answer["against"]["fused"]["ndcg@10"], abs=1e-5
    )
    assert 0 < difference["p_value"] <= 1
    assert "against" not in evaluation_json(WINDS, measured[:1])
    shown = io.StringIO()
    print_evaluation(Console(file=shown, width=80), WINDS, measured)
    text = shown.getvalue()
    assert "a set: 4 documents, 2 questions" in text
    assert "fusion=dbsf dense_weight=0.7 minus fusion=rrf dense_weight=0.5" in text
    assert text.count("│ dense") == 2 and "recall@100" in text and "100.0-100.0" in text
    assert "p = " in text and "…" not in text
