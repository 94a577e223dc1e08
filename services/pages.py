"""Pages of lists as OpenAI has them: `after`, `before`, `limit`, `order` in, `has_more` with first and last id out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.errors import invalid
from services.routing import Call

Json = dict[str, Any]


def page_of(call: Call, newest_last: Sequence[Json], *, default: int, most: int, known: Sequence[str] = ()) -> Json:
    """The page that the query string asks for, of all entries in the order of their making. `known` are further
    parameters that the route itself reads."""
    query = call.query
    for name in query:
        if name not in ("after", "before", "limit", "order", *known):
            raise invalid(f"'{name}' is not known here.", param=name, code="unknown_parameter")
    limit = query.get("limit", str(default))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise invalid(f"'limit' is '{limit[:20]}', but a number from 1 to {most} is expected.", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid(f"'order' is '{order[:20]}', but asc or desc is expected.", param="order")
    ordered = list(newest_last) if order == "asc" else list(reversed(newest_last))
    rest = _between(ordered, query.get("after"), query.get("before"))
    # `before` asks for what stands right in front of it, `after` for what comes next.
    is_backward = "before" in query and "after" not in query
    shown = rest[-int(limit) :] if is_backward else rest[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(shown) < len(rest),
    }


def _between(ordered: list[Json], after: str | None, before: str | None) -> list[Json]:
    ids = [entry["id"] for entry in ordered]
    first = _position(ids, after, "after") + 1 if after else 0
    last = _position(ids, before, "before") if before else len(ids)
    return ordered[first:last]


def _position(ids: list[str], wanted: str, param: str) -> int:
    try:
        return ids.index(wanted)
    except ValueError:
        raise invalid(f"'{param}' names '{wanted[:80]}', which is not in this list.", param=param) from None
