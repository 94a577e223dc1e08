"""What the soak says of its samples, and its plots; the soak itself is `make soak`."""

import sqlite3
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from services.schema import upgrade
from tests.chaos.line_plot import line_plot
from tests.chaos.soak import HISTORY, LIMITS, Asked, judge, judge_answers, rows

STEADY = dict.fromkeys(LIMITS, 100.0)


def test_what_stays_the_same_is_within_its_limits() -> None:
    assert judge([STEADY] * 10) == []


@pytest.mark.parametrize("name", LIMITS)
def test_what_grows_beyond_its_limit_is_named(name: str) -> None:
    samples = [STEADY | {name: 100.0 + 60 * number} for number in range(10)]
    assert judge(samples) == [name]


def test_a_moment_without_the_endpoint_is_no_growth() -> None:
    without = {name: value for name, value in STEADY.items() if name != "endpoint_tasks"}
    assert judge([STEADY, without] * 5) == []


def answers(status: int, number: int, at: float = 0.0) -> list[Asked]:
    return [Asked("stream", status, at, at + 1)] * number


def test_one_failure_in_a_hundred_is_allowed_and_two_are_not() -> None:
    assert judge_answers(answers(200, 99) + answers(503, 1), []) == []
    assert "2.0%" in judge_answers(answers(200, 98) + answers(599, 2), [])[0]


def test_failures_during_a_fault_do_not_count_unless_they_are_our_own_errors() -> None:
    broken = [(10.0, 20.0)]
    assert judge_answers(answers(200, 9) + answers(503, 5, at=9.5) + answers(0, 5, at=19.5), broken) == []
    assert judge_answers(answers(200, 9) + answers(500, 1, at=15), broken) == ["stream was answered with 500"]


@pytest.mark.parametrize("asked", [answers(599, 20), answers(200, 5, at=15), []])
def test_a_soak_in_which_nothing_succeeded_away_from_faults_fails(asked: list[Asked]) -> None:
    assert len(judge_answers(asked, [(10.0, 20.0)])) == 1


def test_rows_are_counted_and_history_apart(tmp_path: Path) -> None:
    file = tmp_path / "windfarm.db"
    upgrade(f"sqlite:///{file}")
    with sqlite3.connect(file) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        before = rows(file)
        database.execute(
            "INSERT INTO journal (operation, payload, state, created_at, updated_at) VALUES ('x','{}','d',0,0)"
        )
        database.commit()
    database.close()
    assert tables >= HISTORY
    assert rows(file) == before | {"history_rows": before["history_rows"] + 1}


def test_a_plot_is_well_formed_and_ends_where_the_last_sample_is() -> None:
    plot = line_plot([(0, 10), (5, 20), (10, 5)], "memory <MiB>", "minutes")
    (line,) = [element for element in xml.fromstring(plot).iter() if element.tag.endswith("polyline")]
    assert len(line.attrib["points"].split()) == 3
    assert "10 minutes" in plot
    assert "no samples" in line_plot([], "memory", "minutes")
