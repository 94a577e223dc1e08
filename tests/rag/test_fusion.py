from __future__ import annotations

import pytest

from rag.fusion import METHODS, RRF_K, FusionMethod, distribution_based, fuse, min_max, reciprocal_rank


def test_reciprocal_rank_looks_at_ranks_alone() -> None:
    near = reciprocal_rank([{"a": 0.9, "b": 0.89}], [1.0])
    far = reciprocal_rank([{"a": 100.0, "b": 1.0}], [1.0])
    assert near == far == {"a": 1 / (RRF_K + 1), "b": 1 / (RRF_K + 2)}


def test_reciprocal_rank_gives_equal_scores_the_same_rank() -> None:
    fused = reciprocal_rank([{"a": 1.0, "b": 1.0, "c": 0.5}], [1.0])
    assert fused["a"] == fused["b"] == 1 / (RRF_K + 1)
    assert fused["c"] == 1 / (RRF_K + 3)


def test_min_max_stretches_each_leg_and_takes_the_weighted_mean() -> None:
    fused = min_max([{"a": 0.9, "b": 0.7}, {"b": 12.0, "c": 2.0}], [3.0, 1.0])
    assert fused == {"a": 0.75, "b": 0.25, "c": 0.0}


def test_distribution_based_keeps_the_order_of_a_leg_with_an_outlier() -> None:
    leg = {f"k{i}": float(i) for i in range(20)} | {"top": 1000.0, "second": 900.0}
    fused = distribution_based([leg], [1.0])
    assert sorted(fused, key=fused.__getitem__, reverse=True)[:3] == ["top", "second", "k19"]


@pytest.mark.parametrize("method", list(METHODS))
def test_found_by_both_legs_beats_found_by_one(method: FusionMethod) -> None:
    fused = fuse([{"both": 0.9, "a": 0.9, "low": 0.1}, {"both": 5.0, "b": 5.0, "low": 0.5}], method=method)
    assert max(fused, key=fused.__getitem__) == "both"


@pytest.mark.parametrize("method", list(METHODS))
def test_one_leg_alone_keeps_its_order(method: FusionMethod) -> None:
    leg = {"a": 3.0, "b": 2.0, "c": 1.0}
    fused = fuse([leg, {}], method=method, weights=[0.2, 0.8])
    assert sorted(fused, key=fused.__getitem__, reverse=True) == ["a", "b", "c"]


@pytest.mark.parametrize("method", list(METHODS))
def test_nothing_found_fuses_to_nothing(method: FusionMethod) -> None:
    assert fuse([{}, {}], method=method) == {}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_leg_with_one_score_counts_as_found(method: FusionMethod) -> None:
    assert fuse([{"a": 0.8}], method=method)["a"] > 0


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="2 legs came with 1 weights"):
        fuse([{"a": 1.0}, {"b": 1.0}], method="rrf", weights=[1.0])
    with pytest.raises(ValueError, match="negative"):
        fuse([{"a": 1.0}], method="rrf", weights=[-1.0])
