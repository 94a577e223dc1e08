from __future__ import annotations

from collections.abc import Sequence

from rag.reranking import rerank, text_of
from tests.rag.test_citations import passage


class ByLength:
    """Longer texts are better."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    async def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        self.asked.append((query, len(texts)))
        return [float(len(text)) for text in texts]


async def test_the_first_passages_are_put_in_the_rerankers_order_and_keep_their_scores() -> None:
    found = [passage("a", number=1), passage("aaa", number=2), passage("aa", number=3), passage("aaaaaa", number=4)]
    reranker = ByLength()
    ordered = await rerank("q", found, reranker, 3)
    assert [each.chunk.document_id for each in ordered] == ["doc2", "doc3", "doc1", "doc4"]
    assert reranker.asked == [("q", 3)]
    assert ordered[0].leg_scores == {"dense": 0.86, "rerank": 3.0} and ordered[0].score == 0.5
    assert "rerank" not in ordered[3].leg_scores


async def test_equal_scores_keep_their_order_and_nothing_stays_nothing() -> None:
    found = [passage("b", number=1), passage("a", number=2)]
    assert [each.chunk.document_id for each in await rerank("q", found, ByLength(), 9)] == ["doc1", "doc2"]
    assert await rerank("q", [], ByLength(), 9) == []


def test_a_reranker_reads_the_headings_too() -> None:
    assert text_of(passage("It lasts twelve weeks.", headings=("Leave",))) == "Leave\nIt lasts twelve weeks."
    assert text_of(passage("Leave lasts.", headings=("Leave",))) == "Leave lasts."
