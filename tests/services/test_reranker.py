"""Rerankers: a service behind a URL that really scores, and a cross-encoder that is really loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.errors import ModelDamaged, ModelNotFound
from rag.types import Passage, StoredChunk
from services.answer_evaluation import evaluate_answers
from services.config import AppConfig, RetrievalConfig
from services.errors import ApiError
from services.evaluation_view import evaluation_json
from services.knowledge_calls import RemoteSearcher
from services.reranker import HttpReranker, make_reranking, opened_reranking
from services.setup_errors import ConfigError
from tests.services.harness import StoreCalls
from tests.services.ingesting import HashEmbedder
from tests.services.rerank_server import RerankServer, rerank_server
from tests.services.test_answer_evaluation import REFERENCES, WINDS, Reciting
from tests.services.test_retrieval_evaluation import SETTINGS, judged_set, measure, opener

TEXTS = ["Trains are booked in second class.", "Parental leave lasts twelve weeks.", "Leave is paid."]


@pytest.fixture
def service() -> Iterator[RerankServer]:
    with rerank_server() as server:
        yield server


async def test_scores_come_in_the_order_of_the_texts(service: RerankServer) -> None:
    reranker = HttpReranker(service.url, model="small", key="s3cret")
    scores = await reranker.scores("How long does parental leave last?", TEXTS)
    await reranker.close()
    assert scores[1] > scores[2] > scores[0]
    headers, body = service.seen[0]
    assert body == {"query": "How long does parental leave last?", "documents": TEXTS, "top_n": 3, "model": "small"}
    assert headers["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("status", "answered with status 500"),
        ("text", "gave no list of results"),
        ("shape", "gave no list of results"),
        ("half", "scored 1 of 3 passages"),
    ],
)
async def test_a_reranker_that_fails_is_an_error_with_the_next_step(
    service: RerankServer, fault: str, message: str
) -> None:
    service.fault = fault
    reranker = HttpReranker(service.url)
    with pytest.raises(ApiError, match=f"{message}.*Check it, or set `retrieval.rerank` to null"):
        await reranker.scores("leave", TEXTS)
    await reranker.close()


async def test_a_reranker_that_is_not_there_is_said() -> None:
    reranker = HttpReranker("http://127.0.0.1:9/rerank")
    with pytest.raises(ApiError, match="does not answer"):
        await reranker.scores("leave", TEXTS)
    await reranker.close()


def found(*texts: str) -> list[Passage]:
    return [
        Passage(StoredChunk(f"c{n}", "col", f"d{n}", "v", "d", text, 0, len(text), n), 1.0 / (n + 1))
        for n, text in enumerate(texts)
    ]


async def test_the_endpoint_reranks_more_than_it_gives_away(service: RerankServer) -> None:
    from services.chat_types import SearchResult

    asked: list[int] = []

    def search(_collections: Sequence[str], _query: str, top_k: int, _actor: str, **_: Any) -> SearchResult:
        asked.append(top_k)
        return SearchResult(found(*TEXTS)[:top_k], {"col": "Handbook"})

    config = RetrievalConfig(rerank=service.url, rerank_candidates=3)
    store = StoreCalls({"search": search})
    searcher = RemoteSearcher(store, config, make_reranking(config, StoreCalls()))
    result = await searcher.search(["Handbook"], "How long does parental leave last?", top_k=1, actor="user")
    assert asked == [3]
    assert [passage.chunk.text for passage in result.passages] == [TEXTS[1]]
    plain = await RemoteSearcher(store, RetrievalConfig()).search(["Handbook"], "leave?", top_k=1, actor="user")
    assert [passage.chunk.text for passage in plain.passages] == [TEXTS[0]]


async def test_an_evaluation_shows_what_the_reranker_brings(service: RerankServer) -> None:
    judged = judged_set(
        {"a": "wind wind wind of the mountain", "b": "The sirocco is a hot wind of the Sahara.", "c": "Some grain."},
        {"q": ("Which hot wind comes from the Sahara?", {"b": 1})},
    )
    settings = SETTINGS.with_values({"rerank": service.url, "rerank_candidates": "2"})
    (measured,) = await measure(judged, settings)
    assert list(measured.legs) == ["dense", "sparse", "fused", "reranked"]
    assert measured.legs["reranked"].metrics["ndcg@10"] == (1.0,)
    shown = evaluation_json(judged, [measured])
    assert shown["reranked"]["ndcg@10"] == 1.0
    assert set(shown["reranked_minus_fused"]["ndcg@10"]) == {"mean", "interval_95", "p_value"}
    service.likes_last = True
    alone = settings.with_values({"rerank_candidates": "1"})
    swapped, first_alone, without = await measure(judged, settings, alone, SETTINGS)
    compared = evaluation_json(judged, [swapped, first_alone])["difference"]
    assert compared["reranked"]["ndcg@10"]["mean"] == pytest.approx(1 / np.log2(3) - 1, abs=1e-5)
    assert compared["fused"]["ndcg@10"]["mean"] == 0.0
    assert "reranked" not in evaluation_json(judged, [without])
    assert list(evaluation_json(judged, [swapped, without])["difference"]) == ["dense", "sparse", "fused"]


async def test_the_cross_encoder_of_the_embedding_deployment_is_called() -> None:
    embedding = StoreCalls({"rerank": lambda _query, texts: [float(n) for n in range(len(texts))]})
    reranking = make_reranking(RetrievalConfig(rerank="embed"), embedding)
    assert reranking is not None
    best = await reranking.best("leave?", found(*TEXTS), 2)
    assert [passage.chunk.text for passage in best] == [TEXTS[2], TEXTS[1]]
    assert embedding.asked == [("rerank", ("leave?", TEXTS))]


async def test_answers_are_evaluated_on_the_reranked_passages(service: RerankServer) -> None:
    """The service likes the worst passage best, so with it nothing counts as evidence any more."""
    service.likes_last = True
    far = ("The sirocco is a hot wind from which sea?",)
    for url, evidence, is_far_answered in ((None, "found", True), (service.url, "none", False)):
        retrieval = {"evidence_threshold": 0.4, "top_k": 1, "rerank": url, "rerank_candidates": 3}
        config = AppConfig.model_validate({"platform": {"retrieval": retrieval}})
        measured = await evaluate_answers(
            WINDS,
            {"q1": REFERENCES["q1"]},
            far,
            config,
            Reciting(WINDS),
            max_tokens=16,
            open_model=opener(HashEmbedder(dimension=512)),
        )
        assert [each.evidence for each in measured.answered] == [evidence]
        assert measured.far == (is_far_answered,)


async def test_what_is_configured_wrongly_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_reranking(RetrievalConfig(), StoreCalls()) is None
    async with opened_reranking(RetrievalConfig(), None) as nothing:
        assert nothing is None
    with pytest.raises(ConfigError, match="Name a URL"):
        make_reranking(RetrievalConfig(rerank="somewhere"), StoreCalls())
    with pytest.raises(ConfigError, match="needs the folder of a cross-encoder"):
        async with opened_reranking(RetrievalConfig(rerank="embed"), None):
            pass
    monkeypatch.delenv("RERANK_KEY", raising=False)
    keyed = RetrievalConfig(rerank="http://127.0.0.1:9/rerank", rerank_key_env="RERANK_KEY")
    with pytest.raises(ConfigError, match="RERANK_KEY, which is not set"):
        make_reranking(keyed, StoreCalls())


@pytest.mark.integration
async def test_a_cross_encoder_is_loaded_from_its_folder_and_scores(tmp_path: Path) -> None:
    """Randomly initialised: what it says means nothing, but it must say it for each pair, always the same."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from cluster.engines.cross_encoder import CrossEncoder
    from services.embedding import Embedding

    words = sorted({word for text in TEXTS for word in text.replace(".", " .").split()})
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(vocabulary), num_labels=1, max_position_embeddings=32, **sizes)
    for part in (fast, transformers.BertForSequenceClassification(config)):
        part.save_pretrained(tmp_path)

    model = CrossEncoder(tmp_path)
    scores = model.scores("parental leave", TEXTS * 10)
    assert len(scores) == 30 and len(set(scores[:3])) == 3
    assert scores[:3] == pytest.approx(model.scores("parental leave", TEXTS), abs=1e-5)
    assert model.scores("leave", ["weeks " * 5000]) and model.scores("leave", []) == []
    async with opened_reranking(RetrievalConfig(rerank="embed"), str(tmp_path)) as reranking:
        assert reranking is not None
        assert await reranking.reranker.scores("parental leave", TEXTS) == pytest.approx(scores[:3], abs=1e-5)
    deployment: Any = SimpleNamespace(_reranker=model)  # without the embedding model that a start loads
    assert await Embedding.rerank(deployment, "parental leave", TEXTS) == pytest.approx(scores[:3], abs=1e-5)
    deployment._reranker = None
    with pytest.raises(ApiError, match="set `reranker` in the section of `embed`"):
        await Embedding.rerank(deployment, "parental leave", TEXTS)
    model.close()

    two = transformers.BertConfig(**{**config.to_dict(), "num_labels": 2})
    transformers.BertForSequenceClassification(two).save_pretrained(tmp_path)
    with pytest.raises(ModelDamaged, match="has 2 outputs"):
        CrossEncoder(tmp_path)
    with pytest.raises(ModelNotFound, match="holds no checkpoint"):
        CrossEncoder(tmp_path / "nowhere")
