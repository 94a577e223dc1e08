"""The table of docs/failure-contract.md: its rows as records, and its measured column written anew."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.faults import Outcome

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "failure-contract.md"
_COLUMNS = 6
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@dataclass(frozen=True, slots=True)
class Row:
    fault: str
    seen: str
    at_most: str
    lost: str
    proven_by: str
    measured: str

    @property
    def tests(self) -> list[tuple[str, str]]:
        """File and name of each test that it names."""
        return _TEST.findall(self.proven_by)

    @property
    def at_most_s(self) -> float | None:
        """The limit in seconds; none: the row says in words that there is none."""
        found = re.match(r"([\d.]+) s", self.at_most)
        return float(found[1]) if found else None


def read_rows(text: str) -> list[Row]:
    return [Row(*cells) for line in text.splitlines() if (cells := _cells(line))]


def with_measured(text: str, measured: Mapping[str, str]) -> str:
    """The document with these cells in the last column, by fault. Raises `KeyError` for a fault without a row."""
    left, lines = dict(measured), []
    for line in text.splitlines():
        cells = _cells(line)
        if cells and cells[0] in left:
            line = f"| {' | '.join([*cells[:-1], left.pop(cells[0])])} |"
        lines.append(line)
    if left:
        raise KeyError(f"no row of the table is called {sorted(left)}")
    return "\n".join(lines) + "\n"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Median, 95th percentile (nearest rank) and number of trials; then the same of what went by until the loss was
    noticed, where that was seen."""
    failed = sum(outcome.problem is not None for outcome in outcomes)
    told = f", {failed} FAILED" if failed else ""
    seconds = [outcome.seconds for outcome in outcomes if not math.isnan(outcome.seconds)]
    noticed = [outcome.noticed_s for outcome in outcomes if outcome.noticed_s is not None]
    if not seconds:
        return f"- ({len(outcomes)}{told})"
    return f"{_both(seconds)} ({len(outcomes)}{told})" + (f"; noticed after {_both(noticed)}" if noticed else "")


def rank(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _both(values: Sequence[float]) -> str:
    return f"{_short(rank(values, 0.5))} / {_short(rank(values, 0.95))} s"


def _short(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2f}"


def _cells(line: str) -> list[str]:
    """Of a row of the table; nothing for its head and for all other lines."""
    cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    is_row = line.startswith("| ") and len(cells) == _COLUMNS and cells[0] != "fault"
    return cells if is_row else []
