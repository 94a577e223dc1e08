"""What the soak says of its samples, and its plots; the soak itself is `make soak`."""

import sqlite3
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from services.schema import upgrade
from tests.chaos.line_plot import line_plot
from tests.chaos.soak import HISTORY, LIMITS, judge, rows

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
