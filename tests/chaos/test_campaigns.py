"""Campaigns fail where nothing happened, and where gaps are longer than what is promised."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.chaos import engines, grammars, streams
from tests.chaos.engines import GAP_LIMIT_S, Verdict, why_too_long


@asynccontextmanager
async def no_replicas(*_args: Any) -> AsyncIterator[tuple[None, None]]:
    yield None, None


@pytest.mark.parametrize(
    ("verdict", "passed_and_failed"),
    [
        (Verdict(num_moved=1, gaps_s=[1.0]), (2, 0)),
        (Verdict(num_moved=0), (0, 2)),
        (Verdict(num_moved=1, gaps_s=[1.0], distances=[5.0]), (0, 2)),
        (Verdict(num_moved=1, gaps_s=[GAP_LIMIT_S + 1]), (1, 1)),
    ],
)
async def test_a_campaign_on_engines(
    monkeypatch: pytest.MonkeyPatch, verdict: Verdict, passed_and_failed: tuple[int, int]
) -> None:
    async def trial(*_args: Any) -> Verdict:
        return verdict

    monkeypatch.setattr(engines, "replicas_of", no_replicas)
    monkeypatch.setattr(engines, "run_trial", trial)
    assert await engines.campaign("llamacpp", 2) == passed_and_failed


@pytest.mark.parametrize(
    ("found", "passed_and_failed"), [((1, []), (2, 0)), ((0, []), (0, 2)), ((1, ["it does not parse"]), (0, 2))]
)
async def test_a_campaign_on_grammars(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, list[str]], passed_and_failed: tuple[int, int]
) -> None:
    async def trial(*_args: Any, **_fields: Any) -> tuple[int, list[str]]:
        return found[0], list(found[1])

    monkeypatch.setattr(grammars, "replicas_of", no_replicas)
    monkeypatch.setattr(grammars, "run_trial", trial)
    assert await grammars.campaign(2) == passed_and_failed


def test_a_trial_of_streams_in_which_nothing_moved_shows_nothing() -> None:
    assert streams.Outcome(num_moves=1).has_passed
    assert not streams.Outcome(num_moves=0).has_passed
    assert not streams.Outcome(num_moves=1, wrong=["another text"]).has_passed


def test_few_long_gaps_among_many_short_ones_are_within_the_limit() -> None:
    assert why_too_long([]) is None
    assert why_too_long([1.0] * 95 + [GAP_LIMIT_S + 1] * 5) is None
    assert why_too_long([1.0] * 94 + [GAP_LIMIT_S + 1] * 6) is not None
