"""The tools that run on the server: what the model is told of each, how its arguments are checked, how it runs.

A tool gets checked arguments and the context of the request, and gives back text for the model. What goes wrong inside
is a `ToolError`: the model gets its message and may try again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rag.refusal import DEFAULT_THRESHOLD
from rag.types import Passage
from services.chat_types import Searcher, SearchTurn, at_once


class ToolError(Exception):
    """A tool cannot do what was asked; the message is for the model."""


class ToolArguments(BaseModel):
    """Base of all arguments: closed, so that a made-up argument is told back to the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def now_utc() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class ToolContext:
    """What tools may use of the request. `passages` are all that the answer may cite; tools append what they find, so
    that a passage's number is its place in this list."""

    searcher: Searcher | None = None
    collections: tuple[str, ...] = ()
    actor: str | None = None
    evidence_threshold: float = DEFAULT_THRESHOLD
    is_threshold_asked: bool = False
    """The request named the threshold; it wins over those of tuned collections."""
    passages: list[Passage] = field(default_factory=list)
    collection_names: dict[str, str] = field(default_factory=dict)
    search_turn: SearchTurn = at_once
    now: Callable[[], datetime] = now_utc


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str
    arguments: type[ToolArguments]
    run: Callable[[Any, ToolContext], Awaitable[str]]

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON schema of the arguments, without the titles that only make a prompt longer."""
        return _without_titles(self.arguments.model_json_schema())

    @property
    def schema(self) -> dict[str, Any]:
        """As OpenAI names it in `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


async def run_tool(tool: Tool, arguments: str, context: ToolContext, *, timeout_s: float) -> str:
    """Check the JSON arguments and run the tool; every fault of either is a `ToolError`."""
    try:
        checked = tool.arguments.model_validate_json(arguments or "{}")
    except ValidationError as error:
        raise ToolError(f"The arguments of {tool.name} are wrong: {_explain(error)}.") from None
    try:
        async with asyncio.timeout(timeout_s):
            return await tool.run(checked, context)
    except TimeoutError:
        raise ToolError(f"{tool.name} did not finish within {timeout_s:g} s.") from None


def _explain(error: ValidationError) -> str:
    faults = [
        f"{'.'.join(str(part) for part in fault['loc']) or 'arguments'}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_context=False)
    ]
    return "; ".join(faults[:3])


def _without_titles(schema: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(schema)
    cleaned: dict[str, Any] = json.loads(text, object_hook=_drop_title)
    return cleaned


def _drop_title(node: dict[str, Any]) -> dict[str, Any]:
    """`title` is a keyword only where it is a string; a property may be called so too."""
    return {key: value for key, value in node.items() if not (key == "title" and isinstance(value, str))}
