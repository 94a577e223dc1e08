"""How tools and their results are put before a model: in the template's own fields where it has them, otherwise as
text in the Hermes format. Pure functions over OpenAI messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from services.chat_types import Message
from services.tools.calls import HERMES, HERMES_END, ParsedCall


def with_tools(
    messages: Sequence[Message], schemas: Sequence[Mapping[str, Any]], *, template_knows_tools: bool
) -> list[Message]:
    """The messages as the model must see them. A template that shows tools gets them as they are."""
    if template_knows_tools:
        return list(messages)
    plain = [_as_text(message) for message in messages]
    return add_to_system(plain, _tool_instructions(schemas)) if schemas else plain


def add_to_system(messages: Sequence[Message], text: str) -> list[Message]:
    """Append a text to the system message, or make one; templates want it first and single."""
    if messages and messages[0].get("role") in ("system", "developer"):
        first = {**messages[0], "content": f"{text_of(messages[0])}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def add_to_last(messages: Sequence[Message], text: str) -> list[Message]:
    """Append a text to the last message: another one could break the turns that templates insist on."""
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{text_of(last)}\n\n{text}".strip()}]


def text_of(message: Message) -> str:
    """The text of a message, also of one that has it in parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""


def call_message(calls: Sequence[tuple[str, ParsedCall]], text: str) -> Message:
    """The assistant's turn that asked for calls, by call id."""
    tool_calls = [
        {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call_id, call in calls
    ]
    return {"role": "assistant", "content": text, "tool_calls": tool_calls}


def result_message(call_id: str, name: str, content: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


def arguments_instruction(schema: Mapping[str, Any]) -> str:
    """What a model is told whose next tokens are bound to the arguments of one function."""
    function = schema["function"]
    fields = function.get("parameters", {}).get("properties", {})
    described = "; ".join(
        f"{name}: {field.get('description', field.get('type', ''))}" for name, field in fields.items()
    )
    return (
        f"Call the function {function['name']}: {function.get('description', '')}\n"
        f"Write only its arguments as JSON. {described}".strip()
    )


def choice_instruction(schemas: Sequence[Mapping[str, Any]]) -> str:
    listed = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
    return f'Call one of these functions. Write only {{"name": ..., "arguments": ...}} as JSON.\n{listed}'


def _tool_instructions(schemas: Sequence[Mapping[str, Any]]) -> str:
    listed = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
    example = f'{HERMES}\n{{"name": "function name", "arguments": {{...}}}}\n{HERMES_END}'
    return f"You may call these functions:\n{listed}\nTo call one, write only:\n{example}"


def _as_text(message: Message) -> Message:
    """A message of a tool exchange as plain text for templates that know no tools."""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text_of(message)}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [
        f'{HERMES}\n{{"name": {json.dumps(call["function"]["name"])}, "arguments": {call["function"]["arguments"]}}}\n'
        f"{HERMES_END}"
        for call in message["tool_calls"]
    ]
    return {"role": "assistant", "content": "\n".join([text_of(message), *calls]).strip()}
