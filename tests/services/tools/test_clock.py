from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.tools import CLOCK
from services.tools.registry import ToolContext, ToolError, run_tool

CONTEXT = ToolContext(now=lambda: datetime(2026, 7, 1, 22, 30, tzinfo=UTC))


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("{}", "Wednesday, 2026-07-01 22:30:00 (UTC, UTC+0000)"),
        ('{"timezone": "Europe/Berlin"}', "Thursday, 2026-07-02 00:30:00 (Europe/Berlin, UTC+0200)"),
        ('{"timezone": "america/new york"}', "Wednesday, 2026-07-01 18:30:00 (America/New_York, UTC-0400)"),
    ],
)
async def test_tells_weekday_date_and_time_of_a_zone(arguments: str, answer: str) -> None:
    assert await run_tool(CLOCK, arguments, CONTEXT, timeout_s=5) == answer


async def test_the_default_clock_runs() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    told = await run_tool(CLOCK, "{}", ToolContext(), timeout_s=5)
    assert told.split(", ")[1][:10] >= f"{before:%Y-%m-%d}"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Tokyo", "Did you mean Asia/Tokyo"),
        ("Europe/Berln", "Did you mean Europe/Berlin"),
        ("../../etc/passwd", "no time zone"),
    ],
)
async def test_an_unknown_zone_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ToolError, match=hint):
        await run_tool(CLOCK, f'{{"timezone": "{name}"}}', CONTEXT, timeout_s=5)
