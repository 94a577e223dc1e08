"""Metrics against values computed by hand from their definitions."""

from __future__ import annotations

import math

import pytest

from rag.ranking_metrics import ndcg, rank_documents, recall, reciprocal_rank
from rag.types import Passage, StoredChunk

LOG3, LOG4, LOG5 = math.log2(3), math.log2(4), math.log2(5)


def passage(document: str, index: int, score: float) -> Passage:
    return Passage(
        StoredChunk(f"{document}-{index}", "c", document, f"v-{document}", document, "text", 0, 4, index), score
    )


def test_ndcg_of_one_relevant_document_depends_on_its_rank_alone() -> None:
    assert ndcg(["a", "b", "c"], {"a": 1}, 10) == 1.0
    assert ndcg(["b", "a", "c"], {"a": 1}, 10) == pytest.approx(1 / LOG3)
    assert ndcg(["b", "c", "a"], {"a": 1}, 10) == pytest.approx(0.5)


def test_ndcg_takes_the_grade_as_gain() -> None:
    judgements = {"a": 4, "b": 2, "c": 1, "d": 0}
    best = 4 + 2 / LOG3 + 1 / LOG4
    assert ndcg(["c", "d", "a", "b"], judgements, 10) == pytest.approx((1 + 4 / LOG4 + 2 / LOG5) / best)
    assert ndcg(["a", "b", "c", "d"], judgements, 10) == pytest.approx(1.0)


def test_ndcg_is_measured_against_what_fits_into_the_depth() -> None:
    judgements = {"a": 1, "b": 1, "c": 1}
    assert ndcg(["a", "b"], judgements, 2) == pytest.approx(1.0)
    assert ndcg(["x", "a", "b"], judgements, 2) == pytest.approx((1 / LOG3) / (1 + 1 / LOG3))


def test_fewer_results_than_the_depth_are_not_filled_up() -> None:
    judgements = {"a": 1, "b": 1}
    assert ndcg(["a"], judgements, 10) == pytest.approx(1 / (1 + 1 / LOG3))
    assert recall(["a"], judgements, 10) == 0.5
    assert ndcg([], judgements, 10) == reciprocal_rank([], judgements, 10) == recall([], judgements, 10) == 0.0


@pytest.mark.parametrize("judgements", [{}, {"a": 0}, {"a": -1, "b": 0}])
def test_without_a_relevant_document_everything_is_zero(judgements: dict[str, int]) -> None:
    assert [metric(["a", "b"], judgements, 10) for metric in (ndcg, reciprocal_rank, recall)] == [0.0, 0.0, 0.0]


def test_grades_below_zero_take_nothing_away() -> None:
    assert ndcg(["bad", "a"], {"a": 2, "bad": -1}, 10) == pytest.approx(1 / LOG3)
    assert reciprocal_rank(["bad", "a"], {"a": 2, "bad": -1}, 10) == 0.5


def test_reciprocal_rank_counts_the_first_relevant_document_within_the_depth() -> None:
    ranking = [f"x{number}" for number in range(9)] + ["a", "b"]
    assert reciprocal_rank(ranking, {"a": 1, "b": 3}, 10) == pytest.approx(0.1)
    assert reciprocal_rank(ranking, {"b": 3}, 10) == 0.0


def test_recall_is_the_share_of_all_relevant_documents() -> None:
    judgements = {"a": 1, "b": 4, "c": 2, "d": 0}
    assert recall(["a", "x", "b", "d"], judgements, 2) == pytest.approx(1 / 3)
    assert recall(["a", "x", "b", "d"], judgements, 10) == pytest.approx(2 / 3)


def test_a_document_of_several_passages_counts_once_at_its_best() -> None:
    found = [
        passage("a", 3, 0.9),
        passage("b", 0, 0.8),
        passage("a", 0, 0.7),
        passage("c", 1, 0.6),
        passage("b", 2, 0.5),
    ]
    ranking = rank_documents(found)
    assert ranking == ["a", "b", "c"]
    assert recall(ranking, {"c": 1}, 3) == 1.0, "the second passage of `a` takes no rank"


def test_ties_keep_the_order_of_the_retriever() -> None:
    tied = [passage(document, 0, 0.5) for document in ("b", "c", "a")]
    assert rank_documents(tied) == ["b", "c", "a"]
    assert rank_documents([]) == []
