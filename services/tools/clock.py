"""The current date and time in any time zone."""

from __future__ import annotations

import difflib
from functools import cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import Field

from services.tools.registry import Tool, ToolArguments, ToolContext, ToolError


class ClockArguments(ToolArguments):
    timezone: str = Field(
        default="UTC", max_length=64, description="IANA name such as Europe/Berlin or America/New_York."
    )


async def _run(arguments: ClockArguments, context: ToolContext) -> str:
    zone = _zone(arguments.timezone)
    now = context.now().astimezone(zone)
    return f"{now:%A, %Y-%m-%d %H:%M:%S} ({zone.key}, UTC{now:%z})"


CLOCK = Tool("datetime", "Tells the current date, weekday and time.", ClockArguments, _run)


def _zone(name: str) -> ZoneInfo:
    known = _names_by_lower_case()
    exact = known.get(name.strip().lower().replace(" ", "_"))
    try:
        return ZoneInfo(exact or name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        cities = {full.rsplit("/", 1)[-1].lower(): full for full in known.values()}
        near = difflib.get_close_matches(name.lower().replace(" ", "_"), [*known, *cities], n=1, cutoff=0.6)
        hint = f" Did you mean {known.get(near[0]) or cities[near[0]]}?" if near else ""
        raise ToolError(f"There is no time zone {name!r}.{hint} Use a name such as Europe/Berlin or UTC.") from None


@cache
def _names_by_lower_case() -> dict[str, str]:
    return {name.lower(): name for name in sorted(available_timezones())}
