"""Reranking: the best passages of a search, read once more together with the question.

A reranker sees both texts at once, so it judges better than two vectors that never met, and is too slow for more than
some dozens of passages. What it gives are scores on a scale of its own: only their order counts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rag.types import Passage

LEG = "rerank"


class Reranker(Protocol):
    """Scores of texts for a question, one each, in their order; higher is better. May raise `RerankerFailed`."""

    async def scores(self, query: str, texts: Sequence[str]) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Reranking:
    """A reranker, and how many passages of a search it reads. Whoever searches goes through this one, so that what is
    measured and tuned is what people get."""

    reranker: Reranker
    num_candidates: int

    def depth(self, wanted: int) -> int:
        """Passages to search for, where `wanted` are given away."""
        return max(wanted, self.num_candidates)

    async def best(self, query: str, passages: Sequence[Passage], wanted: int | None = None) -> list[Passage]:
        """The first `wanted` in the reranker's order; None: all."""
        return (await rerank(query, passages, self.reranker, self.num_candidates))[:wanted]


async def rerank(query: str, passages: Sequence[Passage], reranker: Reranker, num_candidates: int) -> list[Passage]:
    """The first `num_candidates` passages in the reranker's order, the others behind them as they were. Equal scores
    keep their order. The score of the search stays; the reranker's is beside those of the legs."""
    first, others = list(passages[:num_candidates]), list(passages[num_candidates:])
    if not first:
        return others
    scores = await reranker.scores(query, [text_of(passage) for passage in first])
    assert len(scores) == len(first), "one score for each text"
    scored = [
        replace(passage, leg_scores={**passage.leg_scores, LEG: float(score)})
        for passage, score in zip(first, scores, strict=True)
    ]
    return sorted(scored, key=lambda passage: -passage.leg_scores[LEG]) + others


def text_of(passage: Passage) -> str:
    """With the headings above it, as it was embedded."""
    chunk = passage.chunk
    missing = [heading for heading in chunk.headings if heading not in chunk.text]
    return "\n".join((" > ".join(missing), chunk.text)) if missing else chunk.text
