"""The sparse leg against `bm25s` on the committed sets: the same passages, stemmer and stop words, in the same run."""

from contextlib import asynccontextmanager
from pathlib import Path
from statistics import mean

import pytest

from rag.judged_set import JudgedSet, read_judged_set
from rag.language import Language
from rag.ranking_metrics import ndcg, rank_documents, recall
from rag.retriever import RetrievalSettings
from services.config import AppConfig
from services.evaluation_index import EmbeddingModel, cut_documents, open_index
from services.evaluation_settings import EvaluationSettings
from services.retrieval_evaluation import LegSearch
from tests.bench.reference_bm25 import reference_rankings
from tests.services.ingesting import HashEmbedder, word_spans

DATA = Path(__file__).parents[1] / "data" / "multilingual-qa-mini"
NUM_QUERIES = 150
# Cut by words and not by the model's tokens, of which words have about one and a half: no model is needed.
SETTINGS = EvaluationSettings.of(AppConfig()).with_values({"chunk_tokens": "130", "chunk_overlap_tokens": "20"})


@pytest.mark.parametrize("language", ["en", "de", "es", "fr", "it"])
async def test_the_sparse_leg_is_within_a_point_of_bm25s(language: Language) -> None:
    whole = read_judged_set(DATA / language)
    judged = JudgedSet(whole.folder, whole.documents, whole.queries[:: len(whole.queries) // NUM_QUERIES], 0)
    passages = [stored for _, stored in cut_documents(judged.documents, word_spans, SETTINGS.ingestion)]
    reference = reference_rankings(judged, passages, language)
    own = await sparse_rankings(judged)
    for metric, depth in ((ndcg, 10), (recall, 100)):
        theirs = mean(
            metric(found, query.judgements, depth) for found, query in zip(reference, judged.queries, strict=True)
        )
        ours = mean(metric(found, query.judgements, depth) for found, query in zip(own, judged.queries, strict=True))
        assert ours > theirs - 0.01, f"{metric.__name__}@{depth}: {100 * ours:.2f} against {100 * theirs:.2f}"
        assert ours > 0.8


async def sparse_rankings(judged: JudgedSet) -> list[list[str]]:
    @asynccontextmanager
    async def open_model(config):
        yield EmbeddingModel(HashEmbedder(), word_spans, 512)

    async with open_index(judged, SETTINGS, open_model, lambda step, done, total: None) as index:
        search = LegSearch(index, "sparse", RetrievalSettings(top_k=100, candidates=100), reranking=None)
        return [rank_documents(await search.passages_of(query.text)) for query in judged.queries]
