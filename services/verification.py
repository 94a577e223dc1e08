"""What a model wrote, checked against what was found: citations that hold, sentences that nothing supports, documents
that say otherwise. Every quote is looked up letter by letter in the stored version before it is shown.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rag.citations import (
    CitedAnswer,
    CitedPassage,
    answer_sentences,
    cite,
    make_citation,
    needs_meaning,
    passage_sentences,
)
from rag.contradiction import with_contradictions
from rag.language import words
from rag.quoting import choose_quote, introduce, list_quotes
from rag.types import Passage
from services.chat_types import Searcher, SentenceEmbedder
from services.tools.registry import ToolContext

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VerifiedAnswer:
    """`added` is what the server put behind the model's text; `is_quoted`: no passage confirms the model's own words,
    so a sentence of the documents was added."""

    cited: CitedAnswer
    added: str = ""
    is_quoted: bool = False


class AnswerVerifier:
    """`searcher` knows the stored texts; `embedder` helps to attach citations over languages."""

    def __init__(self, searcher: Searcher, embedder: SentenceEmbedder | None) -> None:
        self._searcher = searcher
        self._embedder = embedder

    async def verify(self, text: str, question: str, context: ToolContext) -> VerifiedAnswer:
        """Passages whose quote is not in the stored document (deleted meanwhile, or changed) are cited for nothing."""
        unusable: set[int] = set()
        while True:
            verified = await self._make(text, question, context, unusable)
            wrong = await self._not_in_their_documents(verified.cited, context)
            if not wrong:
                return verified
            unusable |= wrong

    async def _make(self, text: str, question: str, context: ToolContext, unusable: Collection[int]) -> VerifiedAnswer:
        cited = await self._cite(text, question, context, unusable)
        if not cited.citations:
            quoted = await self._quote(cited, question, context, unusable)
            return VerifiedAnswer(cited) if quoted is None else _added(cited, quoted, is_quoted=True)
        names = context.collection_names
        return _added(cited, with_contradictions(cited, question, context.passages, names, unusable))

    async def _not_in_their_documents(self, cited: CitedAnswer, context: ToolContext) -> set[int]:
        citations = [each.citation for each in cited.citations]
        if not citations:
            return set()
        hold = await self._searcher.check_quotes(citations, actor=context.actor)
        wrong = {citation.number for citation, holds in zip(citations, hold, strict=True) if not holds}
        if wrong:
            _log.warning("Quotes of passages %s are not in their stored documents; they are not cited.", sorted(wrong))
        return wrong

    async def _cite(self, text: str, question: str, context: ToolContext, unusable: Collection[int]) -> CitedAnswer:
        """By words first; by meaning too where words of another language left a sentence without support."""
        names = context.collection_names
        cited = cite(text, context.passages, question=question, collection_names=names, unusable=unusable)
        if self._embedder is None or not cited.unsupported or not needs_meaning(text, context.passages):
            return cited
        cosines = await self._cosines(self._embedder, answer_sentences(text), context.passages)
        return cite(
            text,
            context.passages,
            question=question,
            collection_names=names,
            cosines=cosines,
            unusable=unusable,
        )

    async def _cosines(
        self, embedder: SentenceEmbedder, sentences: Sequence[str], passages: Sequence[Passage]
    ) -> npt.NDArray[np.float32]:
        """Of each sentence (row) with the nearest sentence of each passage (column)."""
        parts = [passage_sentences(passage) for passage in passages]
        texts = [*sentences, *(sentence for part in parts for sentence in part)]
        vectors = np.asarray(await embedder.embed_passages(texts), dtype=np.float32)
        cosines = vectors[: len(sentences)] @ vectors[len(sentences) :].T
        ends = np.cumsum([len(part) for part in parts])
        return np.stack([part.max(axis=1) for part in np.split(cosines, ends[:-1], axis=1)], axis=1)

    async def _quote(
        self, cited: CitedAnswer, question: str, context: ToolContext, unusable: Collection[int]
    ) -> CitedAnswer | None:
        """The answer followed by the sentence of the documents that says most about the question."""
        quotes = [quote for quote in list_quotes(question, context.passages) if quote.number not in unusable]
        cosines = None
        if self._embedder is not None and len(quotes) > 1:
            texts = [question, *(quote.text for quote in quotes)]
            vectors = np.asarray(await self._embedder.embed_passages(texts), dtype=np.float32)
            cosines = vectors[1:] @ vectors[0]
        quote = choose_quote(quotes, cosines)
        if quote is None:
            return None
        passage = context.passages[quote.number - 1]
        break_ = "\n\n" if any(words(cited.text)) else ""
        sentence = introduce(question, quote)
        start = len(cited.text) + len(break_)
        citation = make_citation(quote.number, passage, quote.span.start, quote.span.end, context.collection_names)
        cited_passage = CitedPassage(citation, ((start, start + len(sentence)),))
        return dataclasses.replace(cited, text=cited.text + break_ + sentence, citations=(cited_passage,))


def _added(before: CitedAnswer, after: CitedAnswer, *, is_quoted: bool = False) -> VerifiedAnswer:
    return VerifiedAnswer(after, after.text.removeprefix(before.text), is_quoted)
