"""Measures what a search finds on a test set: each leg alone and fused, with the product's own store and retriever.

The ranking down to 10 is the one that the settings give (`candidates` of each leg). For recall at 100 the same search
is asked for as many passages as hold 100 documents. What a search of the product does and is left out here: HTTP, Ray,
and the look into the database at who may read what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from rag.judged_set import JudgedQuery, JudgedSet
from rag.ranking_metrics import Judgements, ndcg, rank_documents, recall, reciprocal_rank
from rag.reranking import Reranking
from rag.retriever import RetrievalSettings, Searches, retrieve
from rag.types import Passage, Vectors
from rag.vector_store import ScoredChunk
from services.evaluation_index import INDEX, OpenModel, Report, SearchableSet, open_index, open_serving_model
from services.evaluation_settings import EvaluationSettings
from services.reranker import opened_reranking

Leg = Literal["dense", "sparse", "fused", "reranked"]
LEGS: tuple[Leg, ...] = ("dense", "sparse", "fused")
"""Always measured; `reranked` where a reranker is configured."""

SHALLOW, DEEP = 10, 100
Metric = Callable[[Sequence[str], Judgements], float]
METRICS: Mapping[str, Metric] = {
    "ndcg@10": lambda ranking, judgements: ndcg(ranking, judgements, SHALLOW),
    "mrr@10": lambda ranking, judgements: reciprocal_rank(ranking, judgements, SHALLOW),
    "recall@10": lambda ranking, judgements: recall(ranking, judgements, SHALLOW),
}
DEEP_METRICS: Mapping[str, Metric] = {"recall@100": lambda ranking, judgements: recall(ranking, judgements, DEEP)}


@dataclass(frozen=True, slots=True)
class LegScores:
    """One value per question, in the set's order. `latency_ms` counts the question's embedding where there is one."""

    metrics: Mapping[str, tuple[float, ...]]
    latency_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One configuration on one set."""

    settings: EvaluationSettings
    embedding_model: str
    num_passages: int
    indexing_s: float
    legs: Mapping[Leg, LegScores]


async def evaluate(
    judged: JudgedSet,
    configurations: Sequence[EvaluationSettings],
    *,
    open_model: OpenModel = open_serving_model,
    report: Report = lambda step, done, total: None,
) -> list[Measurement]:
    """Measure each configuration, in their order. Those that store the same passages search in one index."""
    measured: dict[int, Measurement] = {}
    waiting = dict(enumerate(configurations))
    while waiting:
        first = next(iter(waiting.values()))
        together = {key: settings for key, settings in waiting.items() if settings.shares_index_with(first)}
        async with open_index(judged, first, open_model, report) as index:
            for key, settings in together.items():
                del waiting[key]
                measured[key] = await _measure(judged, index, settings, report)
    return [measured[key] for key in range(len(configurations))]


async def _measure(
    judged: JudgedSet, index: SearchableSet, settings: EvaluationSettings, report: Report
) -> Measurement:
    retrieval = settings.retrieval
    # As many passages as each leg contributes: several may be of one document, and 10 documents are judged.
    wanted = RetrievalSettings(
        top_k=max(retrieval.candidates, SHALLOW),
        candidates=retrieval.candidates,
        fusion=retrieval.fusion,
        dense_weight=retrieval.dense_weight,
    )
    async with opened_reranking(retrieval, settings.embed.reranker) as reranking:
        measured: tuple[Leg, ...] = LEGS if reranking is None else (*LEGS, "reranked")
        legs = {leg: await _measure_leg(judged.queries, index, leg, wanted, report, reranking) for leg in measured}
    return Measurement(settings, index.model_name, index.num_passages, index.indexing_s, legs)


async def _measure_leg(
    queries: Sequence[JudgedQuery],
    index: SearchableSet,
    leg: Leg,
    wanted: RetrievalSettings,
    report: Report,
    reranking: Reranking | None,
) -> LegScores:
    search = LegSearch(index, leg, wanted, reranking if leg == "reranked" else None)
    await search.passages_of(queries[0].text)  # what is loaded at the first search is not its latency
    values: dict[str, list[float]] = {name: [] for name in (*METRICS, *DEEP_METRICS)}
    latency_ms = []
    for position, query in enumerate(queries):
        report(f"searching: {leg}", position, len(queries))
        began = time.perf_counter()
        passages = await search.passages_of(query.text)
        took_ms = 1000 * (time.perf_counter() - began)
        latency_ms.append(took_ms + (index.embedding_ms[position] if leg != "sparse" else 0.0))
        shallow, deep = rank_documents(passages), await search.deep_ranking(query.text)
        for name, metric in METRICS.items():
            values[name].append(metric(shallow, query.judgements))
        for name, metric in DEEP_METRICS.items():
            values[name].append(metric(deep, query.judgements))
    return LegScores({name: tuple(scores) for name, scores in values.items()}, tuple(latency_ms))


class LegSearch:
    """The product's search with one leg or both."""

    def __init__(self, index: SearchableSet, leg: Leg, wanted: RetrievalSettings, reranking: Reranking | None) -> None:
        is_joined = leg in ("fused", "reranked")
        self._embedder = _KnownVectors(index)
        self._store = index.store if is_joined else _OneLeg(index.store, leg)
        # A weight of 0 would make all scores of a leg that is alone the same.
        self._wanted = wanted if is_joined else replace(wanted, dense_weight=0.5)
        self._reranking = reranking
        self._num_passages = index.num_passages

    async def passages_of(self, text: str, wanted: RetrievalSettings | None = None) -> list[Passage]:
        settings = wanted or self._wanted
        found = await retrieve(text, [INDEX], embedder=self._embedder, store=self._store, settings=settings)
        return found if self._reranking is None else await self._reranking.best(text, found)

    async def deep_ranking(self, text: str) -> list[str]:
        """Documents, best first: 100 of them if so many are found at all."""
        depth = DEEP
        while True:
            wanted = replace(self._wanted, top_k=depth, candidates=max(depth, self._wanted.candidates))
            passages = await self.passages_of(text, wanted)
            documents = rank_documents(passages)
            if len(documents) >= DEEP or len(passages) < depth or depth >= self._num_passages:
                return documents
            depth *= 2


class _OneLeg:
    """A store that is asked by meaning alone or by words alone."""

    def __init__(self, store: Searches, leg: Leg) -> None:
        self._store = store
        self._leg = leg

    def search(
        self, collection_ids: Sequence[str], *, vector: npt.NDArray[np.float32] | None, text: str | None, limit: int
    ) -> list[ScoredChunk]:
        if self._leg == "dense":
            text = None
        else:
            vector = None
        return self._store.search(collection_ids, vector=vector, text=text, limit=limit)


class _KnownVectors:
    """Gives the vectors of questions, which were computed, and timed, before."""

    def __init__(self, index: SearchableSet) -> None:
        self._vectors = index.vectors

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._vectors[text] for text in texts])
