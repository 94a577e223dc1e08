"""The parts of `make bench-retrieval` that tune: fusion by set and by leaving one out, refusals, languages, follow-ups.

Refusals are measured as a user would meet them: half of a set's articles is the collection, the questions of the other
half are far negatives in the same language, and near negatives have their paragraph taken out. The threshold is fitted
on one half of the questions and judged on the other, by the code of `windfarm tune`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rag.evidence_threshold import LEAST_QUESTIONS, is_for_fitting
from rag.fusion_sweep import SETTINGS, JudgedHits, Setting, best_of_others, choose_fusion, leg_scores, sweep
from rag.judged_set import JudgedDocument, JudgedQuery, JudgedSet
from rag.ranking import RetrievalSettings, rank
from rag.ranking_metrics import rank_documents
from rag.significance import bootstrap_mean, compare_paired
from rag.types import Embedder, Vectors
from rag.vector_store import ScoredChunk
from services.config import EmbeddingConfig
from services.database import utc_now
from services.evaluation_index import INDEX, EmbeddingModel, OpenModel, SearchableSet, open_index
from services.evaluation_settings import EvaluationSettings
from services.retrieval_evaluation import DEEP_METRICS, METRICS, LegSearch
from services.rewrite import search_queries
from services.tuning import TuningQuestion, tune, tuning_json

_PARALLEL = ("en", "de", "es")
_SHALLOW = 3
_LEAST_IN_HALF = 4 * LEAST_QUESTIONS
"""Sets whose questions have their documents all over the collection (Cranfield) cannot be cut into two collections."""


class RememberingEmbedder:
    """The same texts stand in several collections here; each is computed once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[tuple[str, str], Any] = {}
        self.model_name, self.dimension = embedder.model_name, embedder.dimension

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return await self._vectors("query", texts)

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self._vectors("passage", texts)

    async def _vectors(self, kind: str, texts: Sequence[str]) -> Vectors:
        new = [text for text in dict.fromkeys(texts) if (kind, text) not in self._known]
        if new:
            compute = self._embedder.embed_queries if kind == "query" else self._embedder.embed_passages
            self._known |= {(kind, text): vector for text, vector in zip(new, await compute(new), strict=True)}
        return np.stack([self._known[kind, text] for text in texts])


def remembering(model: EmbeddingModel) -> OpenModel:
    """Opens a loaded model with what it computed before."""
    loaded = replace(model, embedder=RememberingEmbedder(model.embedder))

    @asynccontextmanager
    async def open_model(config: EmbeddingConfig) -> AsyncIterator[EmbeddingModel]:
        yield loaded

    return open_model


async def measure_tuning(judged: JudgedSet, settings: EvaluationSettings, open_model: OpenModel) -> dict[str, Any]:
    """Fusion and refusals of one set."""
    wanted = retrieval_of(settings)
    async with open_index(judged, settings, open_model, _quiet) as index:
        questions = [JudgedHits(_hits(index, each.text, wanted), each.judgements) for each in judged.queries]
        tuned = await _tuned_json(index, judged.queries, questions, wanted)
    halves = [each for each in _halves(judged) if len(each[0].queries) >= _LEAST_IN_HALF]
    return {
        "sweep": _sweep_json(questions, wanted),
        "tuned": tuned,
        "refusal": [await _measure_refusals(half, far, settings, open_model) for half, far in halves],
    }


def leave_one_out(results: Mapping[str, Any]) -> dict[str, Any]:
    """Each set with the fusion that is best on all others, beside its better leg."""
    scores = {
        name: {_setting(label): [value] for label, value in result["sweep"]["fused"].items()}
        for name, result in results.items()
    }
    if len(scores) < 2:
        return {}
    found = {}
    for name, result in results.items():
        setting = best_of_others(scores, name)
        legs = result["sweep"]
        fused, better = scores[name][setting][0], max(legs["dense"], legs["sparse"])
        found[name] = {
            "setting": _label(setting),
            "ndcg@10": round(fused, 4),
            "better_leg": round(better, 4),
            "points_above_better_leg": round(100 * (fused - better), 2),
        }
    return found


async def measure_languages(
    sets: Mapping[str, JudgedSet], settings: EvaluationSettings, open_model: OpenModel
) -> dict[str, Any]:
    """Questions of one language to the same paragraphs in another: share with the right one first, or among ten."""
    wanted = retrieval_of(settings)
    found: dict[str, Any] = {}
    for asked in _PARALLEL:
        for written in _PARALLEL:
            if asked == written or asked not in sets or written not in sets:
                continue
            judged = across(sets[asked], sets[written], asked, written)
            async with open_index(judged, settings, open_model, _quiet) as index:
                questions = [JudgedHits(_hits(index, each.text, wanted), each.judgements) for each in judged.queries]
            ranks = [_rank_of_right(each, wanted) for each in questions]
            found[f"{asked}>{written}"] = {
                "first": round(fmean(rank == 1 for rank in ranks), 4),
                "recall@10": round(fmean(rank <= 10 for rank in ranks), 4),
                **{leg: round(fmean(values), 4) for leg, values in leg_scores(questions, wanted).items()},
                "fused": round(fmean(sweep(questions, wanted, [(wanted.fusion, wanted.dense_weight)]).popitem()[1]), 4),
            }
    return found


def across(questions: JudgedSet, documents: JudgedSet, asked: str, written: str) -> JudgedSet:
    """The parallel sets name the same paragraph alike but for the language."""
    moved = tuple(
        replace(
            each,
            judgements={
                document.replace(f"x{asked}", f"x{written}"): grade for document, grade in each.judgements.items()
            },
        )
        for each in questions.queries
    )
    return replace(documents, queries=moved)


async def measure_follow_ups(folder: Path, settings: EvaluationSettings, open_model: OpenModel) -> dict[str, Any]:
    """How often the passage for a follow-up comes first: asked alone, with the turn before, and as it is searched."""
    talks = [json.loads(line) for line in (folder / "conversations.jsonl").read_text("utf-8").split("\n") if line]
    lines = (folder / "corpus.jsonl").read_text("utf-8").split("\n")
    documents = tuple(
        JudgedDocument(e["_id"], e["title"], e["text"]) for line in lines if line and (e := json.loads(line))
    )
    asked = {(way, number): text for number, talk in enumerate(talks) for way, text in _ways(talk).items()}
    queries = tuple(
        JudgedQuery(f"{way}-{number}", text, {talks[number]["gold"]: 1}) for (way, number), text in asked.items()
    )
    wanted = retrieval_of(settings)
    ranks: dict[str, list[float]] = {}
    async with open_index(JudgedSet(folder, documents, queries, 0), settings, open_model, _quiet) as index:
        for (way, number), text in asked.items():
            hits = JudgedHits(_hits(index, text, wanted), {talks[number]["gold"]: 1})
            ranks.setdefault(way, []).append(_rank_of_right(hits, wanted))
    return {
        way: {
            "first": round(fmean(rank == 1 for rank in found), 3),
            f"first_{_SHALLOW}": round(fmean(rank <= _SHALLOW for rank in found), 3),
            "num_questions": len(found),
        }
        for way, found in ranks.items()
    }


def retrieval_of(settings: EvaluationSettings) -> RetrievalSettings:
    configured = settings.retrieval
    return RetrievalSettings(configured.top_k, configured.candidates, configured.fusion, configured.dense_weight)


def _ways(talk: Mapping[str, Any]) -> dict[str, str]:
    said = [*talk["history"], talk["question"]]
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    return {
        "alone": talk["question"],
        "with_turn_before": f"{said[-3]}\n{said[-1]}",
        "rewritten": search_queries(messages)[0],
    }


async def _measure_refusals(
    judged: JudgedSet, far: Sequence[JudgedQuery], settings: EvaluationSettings, open_model: OpenModel
) -> dict[str, Any]:
    wanted = retrieval_of(settings)
    with_far = replace(judged, queries=(*judged.queries, *far))
    async with open_index(with_far, settings, open_model, _quiet) as index:

        async def find(text: str) -> Sequence[ScoredChunk]:
            return _hits(index, text, wanted)

        questions = [TuningQuestion(each.text, frozenset(each.judgements)) for each in judged.queries]
        questions += [TuningQuestion(each.text, frozenset()) for each in far]
        tuned = await tune(questions, find, wanted, source="questions", prior=settings.retrieval.evidence_threshold)
        return tuning_json(tuned, wanted, source="questions", embedding_model=index.model_name, made_at=utc_now())


def _halves(judged: JudgedSet) -> list[tuple[JudgedSet, list[JudgedQuery]]]:
    """Every other article as a collection, with the questions of the others; then the other way round."""
    titles = {document.id: document.title for document in judged.documents}
    ordered = sorted(set(titles.values()))
    found = []
    for first in (0, 1):
        inside = set(ordered[first::2])
        own = [each for each in judged.queries if all(titles[document] in inside for document in each.judgements)]
        far = [each for each in judged.queries if not any(titles[document] in inside for document in each.judgements)]
        documents = tuple(document for document in judged.documents if document.title in inside)
        found.append((replace(judged, documents=documents, queries=tuple(own)), far))
    return found


def _sweep_json(questions: Sequence[JudgedHits], wanted: RetrievalSettings) -> dict[str, Any]:
    legs = leg_scores(questions, wanted)
    fused = sweep(questions, wanted)
    return {
        **{leg: round(fmean(values), 5) for leg, values in legs.items()},
        "fused": {_label(setting): round(fmean(fused[setting]), 5) for setting in SETTINGS},
    }


async def _tuned_json(
    index: SearchableSet, queries: Sequence[JudgedQuery], questions: Sequence[JudgedHits], wanted: RetrievalSettings
) -> dict[str, Any]:
    """Chosen on one half of the questions; what it and the default find on the other half."""
    present = (wanted.fusion, wanted.dense_weight)
    judging = [each for each in queries if not is_for_fitting(each.text)]
    fitting = [hits for hits, each in zip(questions, queries, strict=True) if is_for_fitting(each.text)]
    shallow = [hits for hits, each in zip(questions, queries, strict=True) if not is_for_fitting(each.text)]
    chosen = choose_fusion(sweep(fitting, wanted), present)
    judged = sweep(shallow, wanted, [chosen.setting, present])
    gain = compare_paired(judged[chosen.setting], judged[present])
    return {
        "setting": _label(chosen.setting),
        "num_judged": len(judging),
        "fused": await _metrics_json(index, judging, shallow, wanted, chosen.setting),
        "fused_default": await _metrics_json(index, judging, shallow, wanted, present),
        "tuned_minus_default": {
            "ndcg@10": round(gain.mean, 4),
            "interval_95": [round(gain.low, 4), round(gain.high, 4)],
            "p_value": round(gain.p_value, 4),
        },
    }


async def _metrics_json(
    index: SearchableSet,
    queries: Sequence[JudgedQuery],
    questions: Sequence[JudgedHits],
    wanted: RetrievalSettings,
    setting: Setting,
) -> dict[str, Any]:
    """As `windfarm eval retrieval` has them: recall at 100 needs a deeper search than the hits that there are."""
    settings = replace(wanted, top_k=wanted.candidates, fusion=setting[0], dense_weight=setting[1])
    shallow = [(rank_documents(rank(each.hits, settings)), each.judgements) for each in questions]
    search = LegSearch(index, "fused", settings, None)
    deep = [(await search.deep_ranking(each.text), each.judgements) for each in queries]
    values = {name: [metric(*each) for each in shallow] for name, metric in METRICS.items()}
    values |= {name: [metric(*each) for each in deep] for name, metric in DEEP_METRICS.items()}
    found = {name: bootstrap_mean(each) for name, each in values.items()}
    return {
        **{name: round(estimate.mean, 4) for name, estimate in found.items()},
        "interval_95": {name: [round(each.low, 4), round(each.high, 4)] for name, each in found.items()},
    }


def _rank_of_right(question: JudgedHits, wanted: RetrievalSettings) -> float:
    found = rank(question.hits, replace(wanted, top_k=wanted.candidates))
    places = [place for place, each in enumerate(found, 1) if question.judgements.get(each.chunk.document_id)]
    return places[0] if places else float("inf")


def _hits(index: SearchableSet, text: str, wanted: RetrievalSettings) -> list[ScoredChunk]:
    return index.store.search([INDEX], vector=index.vectors[text], text=text, limit=wanted.candidates)


def _label(setting: Setting) -> str:
    return f"{setting[0]} {setting[1]:g}"


def _setting(label: str) -> Setting:
    method, weight = label.split()
    return method, float(weight)  # type: ignore[return-value]


def _quiet(step: str, done: int, total: int) -> None:
    """No progress: it runs for minutes and prints what it found."""
