"""The table of the failure contract names tests that exist, a row for every fault, and nothing twice."""

import re

import pytest

from tests.chaos import (
    balancer_faults,
    grammars,
    knowledge_faults,
    network_cut,
    node_faults,
    product_faults,
    provider_faults,
    small_disk,
    stream_faults,
)
from tests.chaos.contract import FILE, ROOT, read_rows, summary, with_measured
from tests.chaos.faults import Fault, Outcome

ROWS = {row.fault: row for row in read_rows(FILE.read_text(encoding="utf-8"))}
FAULTS: list[Fault] = [
    *(
        fault
        for group in (
            stream_faults,
            provider_faults,
            knowledge_faults,
            small_disk,
            network_cut,
            node_faults,
            balancer_faults,
            grammars,
        )
        for fault in group.faults(False)
    ),
    *product_faults.faults(None),  # type: ignore[arg-type]  # nothing is tried here
    *node_faults.faults(None),  # type: ignore[arg-type]
]


def test_each_row_stands_once_and_names_tests() -> None:
    faults = [row.fault for row in read_rows(FILE.read_text(encoding="utf-8"))]
    assert len(faults) == len(set(faults)) > 30
    assert [row.fault for row in ROWS.values() if not row.tests] == []


@pytest.mark.parametrize("fault", sorted(ROWS))
def test_the_tests_of_a_row_exist(fault: str) -> None:
    for file, name in ROWS[fault].tests:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.row)
def test_each_fault_has_its_row_with_its_limit(fault: Fault) -> None:
    assert ROWS[fault.row].at_most_s == fault.at_most_s


def test_each_row_has_its_fault_in_the_campaign() -> None:
    no_fault = {"changed code or configuration"}
    assert set(ROWS) - {fault.row for fault in FAULTS} == no_fault


def test_measured_cells_are_written_and_an_unknown_fault_is_refused() -> None:
    text = FILE.read_text(encoding="utf-8")
    written = read_rows(with_measured(text, {"relay": "1.0 / 2.0 s (10)"}))
    assert [row.measured for row in written if row.fault == "relay"] == ["1.0 / 2.0 s (10)"]
    assert [row for row in written if row.fault != "relay"] == [row for row in ROWS.values() if row.fault != "relay"]
    with pytest.raises(KeyError, match="moonshine"):
        with_measured(text, {"moonshine": "-"})


def test_a_summary_has_median_95th_percentile_trials_and_failures() -> None:
    outcomes = [Outcome(seconds, "") for seconds in (0.5, 0.1, 2.04, 0.2)]
    assert summary(outcomes) == "0.20 / 2.0 s (4)"
    assert summary([*outcomes, Outcome(float("nan"), "", "lost")]) == "0.20 / 2.0 s (5, 1 FAILED)"


def test_a_summary_tells_apart_what_went_by_until_a_loss_was_noticed() -> None:
    outcomes = [Outcome(3.0, "", noticed_s=1.5), Outcome(1.0, "", noticed_s=0.25), Outcome(2.0, "")]
    assert summary(outcomes) == "2.0 / 3.0 s (3); noticed after 0.25 / 1.5 s"
