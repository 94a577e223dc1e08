"""Joins what both legs of a search found into one ranking: pure arithmetic, without LangChain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rag.fusion import FusionMethod, fuse
from rag.types import Passage
from rag.vector_store import ScoredChunk


@dataclass(frozen=True, slots=True)
class RetrievalSettings:
    """`candidates` is what each leg contributes, `top_k` what is left after fusion."""

    top_k: int = 5
    candidates: int = 50
    fusion: FusionMethod = "dbsf"
    dense_weight: float = 0.7


def rank(found: Sequence[ScoredChunk], settings: RetrievalSettings) -> list[Passage]:
    """Fuse the legs. A passage has a `bm25` score only where its words were found."""
    by_key = {(hit.chunk.version_id, hit.chunk.index): hit for hit in found}
    dense = {key: hit.dense for key, hit in by_key.items() if hit.dense is not None}
    sparse = {key: hit.sparse for key, hit in by_key.items() if hit.sparse > 0}
    weights = (settings.dense_weight, 1.0 - settings.dense_weight)
    fused = fuse([dense, sparse], method=settings.fusion, weights=weights)
    best = sorted(fused, key=lambda key: (-fused[key], key))[: settings.top_k]
    return [_passage(by_key[key], fused[key]) for key in best]


def _passage(hit: ScoredChunk, score: float) -> Passage:
    legs = {"dense": hit.dense, "bm25": hit.sparse or None}
    return Passage(hit.chunk, score, {leg: value for leg, value in legs.items() if value is not None})
