"""Counts of experts and the traces made of them: consistent, saved and read alike, refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import LoadError, PlanError
from cluster.expert_load import ExpertLoad, sum_loads
from cluster.known_shapes import KNOWN_SHAPES
from cluster.routing_trace import RoutingTrace, read_trace, write_trace
from cluster.sizing import ModelShape

NUM_LAYERS, NUM_EXPERTS, PER_TOKEN = 3, 4, 2
SHAPE = ModelShape("m", NUM_LAYERS, 8, 8, 4, 4, 2, 16, 64, num_experts=NUM_EXPERTS, experts_per_token=PER_TOKEN)


def load_of(num_tokens: int, seed: int = 0, **changes: Any) -> ExpertLoad:
    """Counts of tokens that each chose two different experts at random, experts with low numbers more often."""
    random = np.random.default_rng(seed)
    pairs = np.zeros((NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS), np.int64)
    for layer in range(NUM_LAYERS):
        for _ in range(num_tokens):
            chosen = random.choice(NUM_EXPERTS, PER_TOKEN, replace=False, p=[0.4, 0.3, 0.2, 0.1])
            pairs[layer][np.ix_(chosen, chosen)] += 1
    load = ExpertLoad(
        tokens=np.einsum("lee->le", pairs).copy(),
        pairs=pairs,
        rank_of=np.array([[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]]),
        num_ranks=2,
        experts_per_token=PER_TOKEN,
        since=100.0,
        until=160.0,
    )
    return replace(load, **changes)


def test_shares_ranks_and_imbalance_follow_from_the_counts() -> None:
    load = load_of(50)
    assert load.num_tokens == 50
    np.testing.assert_allclose(load.shares().sum(axis=1), 1.0)
    ranks = load.rank_tokens()
    assert ranks[1].tolist() == [load.tokens[1, 0] + load.tokens[1, 2], load.tokens[1, 1] + load.tokens[1, 3]]
    assert ranks.sum(axis=1).tolist() == [100, 100, 100]
    np.testing.assert_allclose(load.imbalance(), ranks.max(axis=1) / 50)


def test_no_tokens_are_no_imbalance() -> None:
    load = load_of(0)
    assert load.num_tokens == 0
    assert load.imbalance().tolist() == [1.0, 1.0, 1.0]
    assert not load.shares().any()


def test_the_engines_of_a_gang_add_up() -> None:
    one, two = load_of(20, seed=1, gang="g"), load_of(30, seed=2, gang="g", since=90.0, until=170.0)
    total = sum_loads([one, two])
    np.testing.assert_array_equal(total.pairs, one.pairs + two.pairs)
    assert (total.num_tokens, total.since, total.until, total.gang) == (50, 90.0, 170.0, "g")


def test_loads_of_other_placements_or_models_do_not_add_up() -> None:
    load = load_of(5)
    with pytest.raises(LoadError, match="place the experts differently"):
        sum_loads([load, replace(load, rank_of=1 - load.rank_of)])
    smaller = replace(load, tokens=load.tokens[:2], pairs=load.pairs[:2], rank_of=load.rank_of[:2])
    with pytest.raises(LoadError, match="cannot be added"):
        sum_loads([load, smaller])
    with pytest.raises(LoadError, match="no counts"):
        sum_loads([])


def test_a_later_reading_minus_an_earlier_one_is_what_came_between() -> None:
    first, more = load_of(20, seed=1), load_of(30, seed=2)
    later = replace(sum_loads([first, more]), until=200.0)
    between = later.minus(first)
    np.testing.assert_array_equal(between.pairs, more.pairs)
    assert (between.since, between.until) == (160.0, 200.0)


def test_engines_that_were_restarted_meanwhile_count_whole() -> None:
    assert load_of(5).minus(load_of(50)).num_tokens == 5


def contradictions() -> dict[str, Callable[[ExpertLoad], ExpertLoad]]:
    def other_pair(load: ExpertLoad) -> ExpertLoad:
        pairs = load.pairs.copy()
        pairs[0, 0, 1] += 1
        return replace(load, pairs=pairs)

    def other_count(load: ExpertLoad) -> ExpertLoad:
        tokens = load.tokens.copy()
        tokens[1, 2] += 1
        return replace(load, tokens=tokens)

    def lost_token(load: ExpertLoad) -> ExpertLoad:
        pairs, tokens = load.pairs.copy(), load.tokens.copy()
        pairs[0, 0, 0] += 1
        tokens[0, 0] += 1
        return replace(load, pairs=pairs, tokens=tokens)

    return {
        "counted alike in both orders": other_pair,
        "diagonal": other_count,
        "do not add up": lost_token,
        "negative": lambda load: replace(load, tokens=-load.tokens),
        "only 2": lambda load: replace(load, rank_of=load.rank_of + 1),
        "need pairs of shape": lambda load: replace(load, pairs=load.pairs[:, :2, :2]),
        "cannot be chosen": lambda load: replace(load, experts_per_token=5),
        "whole numbers": lambda load: replace(load, tokens=load.tokens.astype(np.float64)),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("message", contradictions())
def test_counts_that_contradict_themselves_are_refused(message: str) -> None:
    with pytest.raises(LoadError, match=message):
        contradictions()[message](load_of(9))


def test_a_trace_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    load = load_of(40, gang="g")
    write_trace(tmp_path / "t.json", RoutingTrace("m", "abc", load))
    read = read_trace(tmp_path / "t.json")
    assert (read.model, read.checkpoint) == ("m", "abc")
    assert read.load.to_json() == load.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text(path.read_text()[:-40]), "damaged or none at all"),
        (lambda path: path.write_bytes(b"\x93NUMPY"), "damaged or none at all"),
        (lambda path: path.write_text("[1, 2]"), "is no routing trace"),
        (lambda path: path.write_text('{"format": "something"}'), "is no routing trace"),
        (lambda path: change(path, version=2), "has the version 2; this windfarm reads version 1"),
        (lambda path: change(path, tokens=[[1, 2], [3]]), "damaged"),
        (lambda path: change(path, tokens=[[1, 1, 1, 1]] * 3), "damaged: The diagonal"),
        (lambda path: change(path, model=7), "'model' is missing or no text"),
        (lambda path: change(path, num_ranks="many"), "damaged"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_damaged_traces_are_refused_by_name(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_trace(path, RoutingTrace("m", "abc", load_of(9)))
    damage(path)
    with pytest.raises(LoadError, match=message) as caught:
        read_trace(path)
    assert "t.json" in str(caught.value)


def test_one_changed_digit_is_noticed_wherever_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_trace(path, RoutingTrace("m", "abc", load_of(9)))
    content = json.loads(path.read_text())
    for layer in range(NUM_LAYERS):
        for one in range(NUM_EXPERTS):
            for two in range(NUM_EXPERTS):
                changed = json.loads(json.dumps(content))
                changed["pairs"][layer][one][two] += 1
                path.write_text(json.dumps(changed))
                with pytest.raises(LoadError):
                    read_trace(path)


def test_a_trace_plans_the_model_it_was_recorded_of() -> None:
    load = load_of(9)
    assert RoutingTrace("renamed", "abc", load).loads_for(SHAPE, "abc").model == "m"
    assert RoutingTrace("m", "", load).loads_for(SHAPE, "abc").tokens == tuple(map(tuple, load.tokens.tolist()))


@pytest.mark.parametrize(
    ("trace", "shape", "message"),
    [
        (RoutingTrace("m", "abc", load_of(9)), SHAPE, "of another checkpoint: m with fingerprint abc, while m has xyz"),
        (RoutingTrace("other", "", load_of(9)), SHAPE, "of the model 'other', not 'm'"),
        (RoutingTrace("m", "xyz", load_of(9)), replace(SHAPE, num_layers=5), "m has 5 layers of 4 experts"),
        (RoutingTrace("m", "xyz", load_of(9)), replace(SHAPE, experts_per_token=1), "1 per token"),
        (RoutingTrace("m", "xyz", load_of(9)), KNOWN_SHAPES["mistral-7b"], "has no experts"),
    ],
)
def test_a_trace_of_another_model_is_refused(trace: RoutingTrace, shape: ModelShape, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        trace.loads_for(shape, "xyz")
