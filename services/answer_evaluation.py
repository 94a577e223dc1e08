"""Measures the answers of the product on questions whose answers are known: right, grounded, cited, refused.

The set is indexed in a temporary folder as `windfarm eval retrieval` does it, and each question goes through the chat
story of the product with the configured model, in this process. Refusals are decided before the model speaks, so near
negatives (the question with its documents taken out) and far ones (questions of another set) cost no generation.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np

from cluster.engine import Engine, GenerationChunk, GenerationRequest, SamplingParams
from rag.answer_metrics import exact_match, holds_answer, token_f1
from rag.citations import count_claims
from rag.judged_set import JudgedQuery, JudgedSet
from rag.ranking import RetrievalSettings
from rag.refusal import judge_evidence
from rag.reranking import Reranking
from rag.retriever import retrieve
from rag.types import Citation, Vectors
from services.chat import Chat
from services.chat_types import ChatRequest, CitationsReady, Finished, KnowledgeOptions, RetrievalDone, SearchResult
from services.config import AppConfig
from services.evaluation_index import INDEX, OpenModel, Report, SearchableSet, open_index, texts_of_versions
from services.evaluation_settings import EvaluationSettings
from services.reranker import opened_reranking
from services.tuning import ranked

NAME = "evaluation"


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """What came of one question that the set answers. A right citation holds a reference answer or is of a relevant
    document. `first_holds_answer` is None where nothing was cited."""

    question: str
    answer: str
    evidence: str
    is_exact: bool
    f1: float
    holds_answer: bool
    num_claims: int
    num_unsupported: int
    num_citations: int
    num_right_citations: int
    num_exact_spans: int
    cites_relevant: bool
    first_holds_answer: bool | None
    took_s: float


@dataclass(frozen=True, slots=True)
class AnswerMeasurement:
    """`near` and `far` say of each unanswerable question whether it was answered all the same."""

    model: str
    embedding_model: str
    num_passages: int
    answered: tuple[AnsweredQuestion, ...]
    near: tuple[bool, ...]
    far: tuple[bool, ...]


class EngineClient:
    """An engine in this process as the chat story wants its model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def name(self) -> str:
        return self._engine.info.model

    @property
    def max_context(self) -> int:
        return self._engine.info.max_context

    @property
    def template_knows_tools(self) -> bool:
        return self._engine.info.template_knows_tools

    def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        return self._engine.generate(request)

    async def count_tokens(self, request: GenerationRequest) -> int:
        return await self._engine.count_prompt_tokens(request)


async def evaluate_answers(
    judged: JudgedSet,
    references: Mapping[str, Sequence[str]],
    far: Sequence[str],
    config: AppConfig,
    engine: Engine,
    *,
    max_tokens: int,
    open_model: OpenModel,
    report: Report = lambda step, done, total: None,
) -> AnswerMeasurement:
    """Ask every question that has a reference answer. `engine` has been started."""
    asked = replace(judged, queries=tuple(query for query in judged.queries if query.id in references))
    with_far = replace(
        asked, queries=(*asked.queries, *(JudgedQuery(f"far-{n}", text, {}) for n, text in enumerate(far)))
    )
    settings = EvaluationSettings.of(config)
    async with (
        open_index(with_far, settings, open_model, report) as index,
        opened_reranking(config.platform.retrieval, settings.embed.reranker) as reranking,
    ):
        searcher = SetSearcher(index, judged, _retrieval(config), reranking)
        chat = Chat(searcher, retrieval=config.platform.retrieval, chat=config.platform.chat, embedder=index.embedder)
        client = EngineClient(engine)
        answered = []
        for position, query in enumerate(asked.queries):
            report("asking", position, len(asked.queries))
            answered.append(await _ask(chat, client, query, references[query.id], max_tokens, searcher))
        threshold = config.platform.retrieval.evidence_threshold
        near = [await searcher.is_answered(query.text, threshold, without=query.judgements) for query in asked.queries]
        far_answered = [await searcher.is_answered(text, threshold) for text in far]
        return AnswerMeasurement(
            engine.info.model, index.model_name, index.num_passages, tuple(answered), tuple(near), tuple(far_answered)
        )


class SetSearcher:
    """The knowledge base of the chat story, on an evaluation's index."""

    def __init__(
        self, index: SearchableSet, judged: JudgedSet, settings: RetrievalSettings, reranking: Reranking | None
    ) -> None:
        self._index = index
        self._settings = settings
        self._reranking = reranking
        self._texts = texts_of_versions(judged.documents)

    async def search(
        self, collections: Sequence[str], query: str, *, top_k: int | None, actor: str | None
    ) -> SearchResult:
        wanted = top_k or self._settings.top_k
        depth = wanted if self._reranking is None else self._reranking.depth(wanted)
        settings = replace(self._settings, top_k=depth)
        passages = await retrieve(query, [INDEX], embedder=self, store=self._index.store, settings=settings)
        if self._reranking is not None:
            passages = await self._reranking.best(query, passages, wanted)
        return SearchResult(passages, {INDEX: NAME})

    async def check_quotes(self, citations: Sequence[Citation], *, actor: str | None) -> list[bool]:
        return [self._texts.get(each.version_id, "")[each.start : each.end] == each.quote for each in citations]

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Those of the set's questions were computed before."""
        return np.stack([self._index.vectors[text] for text in texts])

    async def is_answered(self, question: str, threshold: float, without: Mapping[str, int] | None = None) -> bool:
        """Whether the passages count as evidence, those of some documents taken out."""
        vector = self._index.vectors[question]
        hits = self._index.store.search([INDEX], vector=vector, text=question, limit=self._settings.candidates)
        kept = [hit for hit in hits if hit.chunk.document_id not in (without or {})]
        passages = await ranked(question, kept, self._settings, self._reranking)
        return judge_evidence(question, passages, threshold).is_found


async def _ask(
    chat: Chat,
    client: EngineClient,
    query: JudgedQuery,
    references: Sequence[str],
    max_tokens: int,
    searcher: SetSearcher,
) -> AnsweredQuestion:
    request = ChatRequest(
        query.id,
        client.name,
        [{"role": "user", "content": query.text}],
        sampling=SamplingParams(max_tokens=max_tokens),
        knowledge=KnowledgeOptions((NAME,)),
    )
    began = time.perf_counter()
    events = [event async for event in chat(request, client)]
    took_s = time.perf_counter() - began
    ready = next(event for event in events if isinstance(event, CitationsReady))
    text = next(event for event in events if isinstance(event, Finished)).text
    citations = [each.citation for each in sorted(ready.citations, key=lambda each: each.answer_spans[0])]
    exact = await searcher.check_quotes(citations, actor=None)
    relevant = [query.judgements.get(each.document_id, 0) > 0 for each in citations]
    holding = [holds_answer(each.quote, references) for each in citations]
    retrieval = next(event for event in events if isinstance(event, RetrievalDone))
    is_refused = retrieval.evidence == "none"
    return AnsweredQuestion(
        question=query.text,
        answer=text,
        evidence=ready.evidence,
        is_exact=exact_match(text, references),
        f1=0.0 if is_refused else token_f1(text, references),
        holds_answer=not is_refused and holds_answer(text, references),
        num_claims=0 if is_refused else count_claims(text),
        num_unsupported=len(ready.unsupported),
        num_citations=len(citations),
        num_right_citations=sum(one or other for one, other in zip(relevant, holding, strict=True)),
        num_exact_spans=sum(exact),
        cites_relevant=any(relevant),
        first_holds_answer=holding[0] if holding else None,
        took_s=took_s,
    )


def _retrieval(config: AppConfig) -> RetrievalSettings:
    wanted = config.platform.retrieval
    return RetrievalSettings(wanted.top_k, wanted.candidates, wanted.fusion, wanted.dense_weight)


@asynccontextmanager
async def running_engine(engine: Engine) -> AsyncIterator[Engine]:
    """Started and stopped, however the work with it ends."""
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
