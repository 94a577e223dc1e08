"""Reads the tool calls that a model wrote into its answer, in the two formats that open models are trained on:

    <tool_call>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call>      (Hermes, Qwen, and others)
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}]   or   [TOOL_CALLS]name[ARGS]{...}      (Mistral)

Only these count as calls: no guessing from words. Text before a call is ordinary text and streams on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

HERMES, HERMES_END = "<tool_call>", "</tool_call>"
MISTRAL = "[TOOL_CALLS]"
_MARKERS = (HERMES, MISTRAL)
_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")


class MalformedCall(Exception):
    """The model began a tool call that cannot be read; the message is for the model."""


@dataclass(frozen=True, slots=True)
class ParsedCall:
    name: str
    arguments: str
    """JSON text of an object."""


class ToolCallReader:
    """Divides a stream into text to show at once and calls to parse at its end."""

    def __init__(self) -> None:
        self._held = ""
        self._in_call = False

    def feed(self, text: str) -> str:
        """What can be shown now: never a part of a call, nor of what may become its marker."""
        self._held += text
        if self._in_call:
            return ""
        starts = [place for marker in _MARKERS if (place := self._held.find(marker)) >= 0]
        if starts:
            self._in_call = True
            return self._release(min(starts))
        return self._release(len(self._held) - _marker_beginning(self._held))

    def finish(self) -> tuple[str, list[ParsedCall]]:
        """The rest of the text and the calls. Raises `MalformedCall`."""
        if not self._in_call:
            return self._release(len(self._held)), []
        return "", parse_calls(self._held)

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown


def parse_calls(text: str) -> list[ParsedCall]:
    """The calls of a text that begins with a marker."""
    calls = _parse_mistral(text) if text.startswith(MISTRAL) else _parse_hermes(text)
    if not calls:
        raise MalformedCall("The tool call is empty. Write one JSON object with name and arguments.")
    return calls


def _parse_hermes(text: str) -> list[ParsedCall]:
    bodies = [part.split(HERMES_END)[0] for part in text.split(HERMES)[1:]]
    return [_to_call(_decode(body)[0]) for body in bodies if body.strip()]


def _parse_mistral(text: str) -> list[ParsedCall]:
    calls: list[ParsedCall] = []
    for part in text.split(MISTRAL)[1:]:
        rest = part.strip()
        if rest.startswith("["):
            listed, _ = _decode(rest)
            calls += [_to_call(entry) for entry in listed]
        while match := _MISTRAL_CALL.match(rest):
            arguments, length = _decode(rest[match.end() :])
            calls.append(_to_call({"name": match.group(1), "arguments": arguments}))
            rest = rest[match.end() + length :]
        if rest.startswith("{"):
            calls.append(_to_call(_decode(rest)[0]))
    return calls


def _decode(text: str) -> tuple[Any, int]:
    """The JSON value at the beginning of a text and where it ends."""
    lead = len(text) - len(text.lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, lead)
    except ValueError as error:
        raise MalformedCall(f"The tool call is no valid JSON: {error}.") from None
    except RecursionError:
        raise MalformedCall("The tool call is nested too deeply.") from None


def _to_call(entry: Any) -> ParsedCall:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise MalformedCall('A tool call must be a JSON object {"name": ..., "arguments": {...}}.')
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _decode(arguments)[0] if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise MalformedCall(f"The arguments of {entry['name']} must be a JSON object.")
    return ParsedCall(entry["name"], json.dumps(arguments, ensure_ascii=False))


def _marker_beginning(text: str) -> int:
    """Length of the longest end of the text with which a marker could begin."""
    longest = max(len(marker) for marker in _MARKERS) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in _MARKERS):
            return length
    return 0
