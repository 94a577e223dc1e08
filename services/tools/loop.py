"""The server-side tool loop: generate, run what the model called, give it the results, until it answers.

`tool_choice` "none" and "auto" leave the model its words; a forced choice binds its tokens to a JSON schema, once. A
call of a client's tool ends the answer; server calls of that same turn are left out, because their results would be
lost with it. Faults of a call (unknown tool, wrong arguments, time-out, repetition) go back to the model as text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.engine import GenerationChunk, GenerationRequest, SamplingParams, Usage
from services.chat_types import ChatEvent, Finished, Message, ModelClient, TextDelta, ToolCall, ToolChoice, ToolResult
from services.tools.calls import MalformedCall, ParsedCall, ToolCallReader
from services.tools.prompting import (
    add_to_last,
    arguments_instruction,
    call_message,
    choice_instruction,
    result_message,
    with_tools,
)
from services.tools.registry import Tool, ToolContext, ToolError, run_tool

FORCED_CALL_TOKENS = 384
"""Room for the arguments of a forced call where the client names none."""
_ANSWER_NOW = "No more functions can be called. Answer now with what you know."
_NO_ANSWER = "I could not finish this with the tools that I have."


@dataclass(frozen=True, slots=True)
class ToolLimits:
    max_rounds: int = 6
    """Turns in which tools may be called; after them the model must answer."""
    max_repeats: int = 2
    """How often the same call with the same arguments may come again before tools are taken away."""
    timeout_s: float = 20.0


@dataclass(slots=True)
class _State:
    messages: list[Message]
    text: str = ""
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    finish_reason: Literal["stop", "length"] = "stop"
    results: dict[tuple[str, str], str] = field(default_factory=dict)
    num_repeats: int = 0
    num_calls: int = 0

    def add_usage(self, usage: Usage) -> None:
        self.usage = Usage(
            self.usage.num_prompt_tokens + usage.num_prompt_tokens,
            self.usage.num_completion_tokens + usage.num_completion_tokens,
            self.usage.num_cached_tokens + usage.num_cached_tokens,
        )


@dataclass(slots=True)
class _Turn:
    """What one generation came to."""

    text: str = ""
    calls: list[ParsedCall] = field(default_factory=list)
    fault: str | None = None
    is_cut: bool = False


class ToolLoop:
    """One answer. `hold_first_text`: text of the first turn is shown only if the turn calls a tool, and `is_held`
    says so afterwards; for answers that must rest on a tool's result."""

    def __init__(
        self,
        model: ModelClient,
        *,
        request_id: str,
        sampling: SamplingParams,
        tools: Mapping[str, Tool],
        client_tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
        context: ToolContext,
        limits: ToolLimits | None = None,
        hold_first_text: bool = False,
    ) -> None:
        self._model = model
        self._request_id = request_id
        self._sampling = sampling
        self._tools = tools
        self._client_schemas = {schema["function"]["name"]: schema for schema in client_tools}
        self._choice = tool_choice
        self._context = context
        self._limits = limits or ToolLimits()
        self._hold_first_text = hold_first_text
        self.is_held = False

    async def run(self, messages: Sequence[Message]) -> AsyncGenerator[ChatEvent, None]:
        """Events of the answer, with `Finished` as the last one."""
        state = _State(list(messages))
        for round_number in range(self._limits.max_rounds + 1):
            is_last = round_number == self._limits.max_rounds or state.num_repeats > self._limits.max_repeats
            choice = "none" if is_last or not self._schemas else self._choice if round_number == 0 else "auto"
            if is_last:
                state.messages = add_to_last(state.messages, _ANSWER_NOW)
            turn = _Turn()
            hold = self._hold_first_text and round_number == 0
            async with aclosing(self._generate(state, choice, turn, hold=hold)) as deltas:
                async for delta in deltas:
                    yield delta
            if choice == "none" or not (turn.calls or turn.fault):
                self.is_held = hold
                if is_last and not state.text:
                    state.text = _NO_ANSWER
                    yield TextDelta(_NO_ANSWER)
                break
            client_calls = [call for call in turn.calls if call.name in self._client_schemas]
            if client_calls:
                for call in self._hand_over(state, client_calls):
                    yield call
                yield Finished("length" if turn.is_cut else "tool_calls", state.usage, state.text)
                return
            async with aclosing(self._run_calls(state, turn)) as events:
                async for event in events:
                    yield event
        yield Finished(state.finish_reason, state.usage, state.text)

    @property
    def _schemas(self) -> dict[str, Mapping[str, Any]]:
        return {name: tool.schema for name, tool in self._tools.items()} | self._client_schemas

    def _generate(
        self, state: _State, choice: ToolChoice, turn: _Turn, *, hold: bool
    ) -> AsyncGenerator[TextDelta, None]:
        if choice in ("none", "auto"):
            return self._generate_freely(state, turn, with_calls=choice == "auto", hold=hold)
        return self._generate_forced(state, choice, turn)

    async def _generate_freely(
        self, state: _State, turn: _Turn, *, with_calls: bool, hold: bool
    ) -> AsyncGenerator[TextDelta, None]:
        """The model's own words; calls are read out of them."""
        schemas = list(self._schemas.values()) if with_calls else []
        reader = ToolCallReader()
        async with aclosing(self._stream(state, state.messages, schemas, self._sampling)) as chunks:
            async for chunk in chunks:
                shown = reader.feed(chunk.text) if self._schemas else chunk.text
                for delta in self._show(state, turn, shown, chunk, hold):
                    yield delta
        try:
            rest, turn.calls = reader.finish()
            for delta in self._show(state, turn, rest, None, hold):
                yield delta
        except MalformedCall as error:
            turn.fault = str(error)

    def _show(
        self, state: _State, turn: _Turn, text: str, chunk: GenerationChunk | None, hold: bool
    ) -> list[TextDelta]:
        if not text:
            # Logprobs may come with held-back text; they still belong to the answer.
            return [TextDelta("", chunk)] if chunk and chunk.logprobs and not hold else []
        if state.text and not turn.text:
            text = "\n\n" + text.lstrip()
        turn.text += text
        if hold:
            return []
        state.text += text
        return [TextDelta(text, chunk)]

    async def _generate_forced(self, state: _State, choice: ToolChoice, turn: _Turn) -> AsyncGenerator[TextDelta, None]:
        """Tokens bound to the schema of one function's arguments, or of a choice among all ("required")."""
        schemas = self._schemas
        if choice == "required":
            instruction = choice_instruction(list(schemas.values()))
            schema: dict[str, Any] = {"anyOf": [_call_schema(entry["function"]) for entry in schemas.values()]}
        else:
            instruction = arguments_instruction(schemas[choice])
            schema = _parameters(schemas[choice]["function"])
        sampling = dataclasses.replace(
            self._sampling,
            json_schema=schema,
            stop=(),
            logprobs=None,
            max_tokens=min(self._sampling.max_tokens or FORCED_CALL_TOKENS, FORCED_CALL_TOKENS),
        )
        written = ""
        messages = add_to_last(state.messages, instruction)
        async with aclosing(self._stream(state, messages, [], sampling)) as chunks:
            async for chunk in chunks:
                written += chunk.text
                turn.is_cut = turn.is_cut or chunk.finish_reason == "length"
        state.finish_reason = "stop"
        try:
            turn.calls = [_read_forced(choice, written)]
        except MalformedCall as error:
            turn.fault = f"{error} It was cut off at the token limit." if turn.is_cut else str(error)
        return
        yield  # makes this a generator: a forced call shows no text

    async def _stream(
        self,
        state: _State,
        messages: Sequence[Message],
        schemas: Sequence[Mapping[str, Any]],
        sampling: SamplingParams,
    ) -> AsyncGenerator[GenerationChunk, None]:
        knows_tools = self._model.template_knows_tools
        request = GenerationRequest(
            request_id=self._request_id,
            messages=with_tools(messages, schemas, template_knows_tools=knows_tools),
            tools=list(schemas) if schemas and knows_tools else None,
            sampling=sampling,
        )
        async with aclosing(self._model.stream(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.usage:
                    state.add_usage(chunk.usage)
                if chunk.finish_reason:
                    state.finish_reason = chunk.finish_reason
                yield chunk

    def _hand_over(self, state: _State, calls: Sequence[ParsedCall]) -> list[ToolCall]:
        return [
            ToolCall(self._call_id(state), call.name, call.arguments, "client", index)
            for index, call in enumerate(calls)
        ]

    async def _run_calls(self, state: _State, turn: _Turn) -> AsyncGenerator[ChatEvent, None]:
        """Run the calls one after another and write turn and results into the history."""
        if turn.fault:
            state.num_repeats += 1
            state.messages.append({"role": "assistant", "content": turn.text or "(an unreadable tool call)"})
            state.messages.append({"role": "user", "content": f"{turn.fault} Try again, or answer without tools."})
            return
        numbered = [(self._call_id(state), call) for call in turn.calls]
        state.messages.append(call_message(numbered, turn.text.strip()))
        for index, (call_id, call) in enumerate(numbered):
            yield ToolCall(call_id, call.name, call.arguments, "server", index)
            content, is_error = await self._result(state, call)
            state.messages.append(result_message(call_id, call.name, content))
            rests_on = tuple(dict.fromkeys(passage.chunk.document_id for passage in self._context.passages))
            yield ToolResult(call_id, call.name, content, is_error, rests_on)

    async def _result(self, state: _State, call: ParsedCall) -> tuple[str, bool]:
        key = (call.name, _canonical(call.arguments))
        if key in state.results:
            state.num_repeats += 1
            return f"You made this very call before. Its result was: {state.results[key]} Answer now.", True
        try:
            if call.name not in self._tools:
                raise ToolError(f"There is no tool {call.name!r}. There are: {', '.join(sorted(self._schemas))}.")
            content = await run_tool(
                self._tools[call.name], call.arguments, self._context, timeout_s=self._limits.timeout_s
            )
        except ToolError as error:
            state.results[key] = str(error)
            return str(error), True
        state.results[key] = content
        return content, False

    def _call_id(self, state: _State) -> str:
        state.num_calls += 1
        return f"call_{self._request_id.removeprefix('chatcmpl-')[:16]}_{state.num_calls}"


def _read_forced(choice: ToolChoice, written: str) -> ParsedCall:
    try:
        value = json.loads(written)
        if choice != "required":
            return ParsedCall(choice, json.dumps(value, ensure_ascii=False))
        return ParsedCall(value["name"], json.dumps(value["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedCall(f"The tool call is no valid JSON: {error}.") from None


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return dict(function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False})


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": _parameters(function)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _canonical(arguments: str) -> str:
    return json.dumps(json.loads(arguments), sort_keys=True)
