"""Campaigns fail where nothing happened, and where gaps are longer than what is promised."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.chaos import campaign, engines, grammars, node_faults, streams
from tests.chaos.engines import GAP_LIMIT_S, Answer, Verdict, why_too_long
from tests.chaos.faults import Fault, Heard, Outcome


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


def guided(text: str, seam: int | None) -> Answer:
    return Answer(text=text, seam=seam, gap_s=0.5, end={"finish_reason": "stop"})


def test_answers_that_are_bound_to_a_schema_have_to_move_and_to_satisfy_it() -> None:
    book = {"title": "Salt", "kind": "fable", "year": 1999, "people": ["Ada", "Ben"], "is_true": False}
    moved, stayed = guided(json.dumps(book), seam=5), guided(json.dumps(book), seam=None)
    assert grammars.judge([moved, stayed], []).problem is None
    assert grammars.judge([moved, stayed], []).seconds == 0.5
    assert "no answer went on" in (grammars.judge([stayed], []).problem or "")
    assert "1999" in (grammars.judge([moved, guided(json.dumps(book | {"kind": "1999"}), seam=None)], []).problem or "")
    assert grammars.judge([moved], ["it was lost"]).problem == "it was lost"


def heard(num_tokens: int, *, is_cut: bool = False) -> Heard:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": num_tokens}}
    end = "" if is_cut else "data: [DONE]\n\n"
    return Heard(200, body=f"data: {json.dumps(usage)}\n\n{end}", longest_silence_s=num_tokens / 100)


def test_streams_of_a_lost_rank_or_node_have_to_go_on_elsewhere_with_all_their_tokens() -> None:
    whole = heard(node_faults.NUM_TOKENS)
    assert node_faults.judge([whole, whole], num_moved=1).problem is None
    assert node_faults.judge([whole, whole], num_moved=1).seconds == whole.longest_silence_s
    assert "went on" in (node_faults.judge([whole, whole], num_moved=0).problem or "")
    assert "1 of 2" in (node_faults.judge([whole, heard(9, is_cut=True)], num_moved=1).problem or "")
    assert "9 tokens" in (node_faults.judge([whole, heard(9)], num_moved=1).problem or "")


def test_faults_are_chosen_by_parts_of_their_rows_and_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [Fault("a slow disk", 1, None), Fault("a slow node", 1, None, needs="vllm"), Fault("a client", 1, None)]
    monkeypatch.setattr(campaign, "why_missing", lambda part: f"no {part}")
    assert [fault.row for fault in campaign.chosen(faults, ["slow", "disk"])] == ["a slow disk"]
    monkeypatch.setattr(campaign, "why_missing", lambda _: None)
    assert campaign.chosen(faults, ["node", "client"]) == faults[1:]
    assert campaign.chosen(faults, [""]) == faults


async def test_a_series_of_trials_is_judged_by_time_as_single_trials_are() -> None:
    async def series(num_trials: int) -> list[Outcome]:
        return [Outcome(float(number), "") for number in range(num_trials)]

    outcomes = await Fault("slow", 1, None, series).try_often(3)
    assert [outcome.problem is None for outcome in outcomes] == [True, True, False]


def test_a_trial_of_streams_in_which_nothing_moved_shows_nothing() -> None:
    assert streams.Outcome(num_moves=1).has_passed
    assert not streams.Outcome(num_moves=0).has_passed
    assert not streams.Outcome(num_moves=1, wrong=["another text"]).has_passed


def test_few_long_gaps_among_many_short_ones_are_within_the_limit() -> None:
    assert why_too_long([]) is None
    assert why_too_long([1.0] * 95 + [GAP_LIMIT_S + 1] * 5) is None
    assert why_too_long([1.0] * 94 + [GAP_LIMIT_S + 1] * 6) is not None
