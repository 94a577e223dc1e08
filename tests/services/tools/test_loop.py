from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import pytest

from cluster.engine import SamplingParams
from services.chat_types import ChatEvent, Finished, TextDelta, ToolCall, ToolResult
from services.tools import TOOLS
from services.tools.loop import FORCED_CALL_TOKENS, ToolLimits, ToolLoop
from services.tools.registry import Tool, ToolArguments, ToolContext
from tests.services.scripted_model import ScriptedModel

QUESTION = [{"role": "user", "content": "What is 2+3?"}]
WEATHER: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(name: str = "calculator", **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments or {'expression': '2+3'}})}</tool_call>"


def make_loop(model: ScriptedModel, **options: Any) -> ToolLoop:
    settings: dict[str, Any] = {
        "request_id": "chatcmpl-test",
        "sampling": SamplingParams(),
        "tools": TOOLS,
        "context": ToolContext(),
    }
    return ToolLoop(model, **(settings | options))


async def run(model: ScriptedModel, **options: Any) -> list[ChatEvent]:
    return [event async for event in make_loop(model, **options).run(QUESTION)]


def text_of(events: list[ChatEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def results(events: list[ChatEvent]) -> list[ToolResult]:
    return [event for event in events if isinstance(event, ToolResult)]


def finished(events: list[ChatEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Finished) for event in events) == 1
    return events[-1]


async def test_an_answer_without_a_call_streams_through() -> None:
    events = await run(ScriptedModel("It is five, I think."))
    assert text_of(events) == finished(events).text == "It is five, I think."
    assert len([event for event in events if isinstance(event, TextDelta)]) > 1
    assert finished(events).finish_reason == "stop"


async def test_a_call_is_run_and_its_result_given_to_the_model() -> None:
    model = ScriptedModel(call(), "It is 5.")
    events = await run(model)
    assert [type(event) for event in events if not isinstance(event, TextDelta)] == [ToolCall, ToolResult, Finished]
    assert results(events)[0].content == "5"
    assert text_of(events) == "It is 5."
    assert "<tool_response>\n5\n</tool_response>" in str(model.prompts[1][-1]["content"])


async def test_a_template_that_knows_tools_gets_them_in_its_own_fields() -> None:
    model = ScriptedModel('[TOOL_CALLS] [{"name": "calculator", "arguments": {"expression": "2+3"}}]', "5")
    model._template_knows_tools = True
    await run(model)
    assert model.prompts[0] == QUESTION
    assert {schema["function"]["name"] for schema in model.requests[0].tools or ()} == set(TOOLS)
    asked, answered = model.prompts[1][1:]
    assert asked["tool_calls"][0]["function"]["name"] == "calculator"  # type: ignore[index]
    assert answered == {
        "role": "tool",
        "tool_call_id": asked["tool_calls"][0]["id"],  # type: ignore[index]
        "name": "calculator",
        "content": "5",
    }


async def test_a_template_without_tools_reads_of_them_in_the_system_message() -> None:
    model = ScriptedModel("ok")
    await run(model)
    system = model.prompts[0][0]
    assert system["role"] == "system"
    assert all(name in str(system["content"]) for name in TOOLS)
    assert model.requests[0].tools is None


async def test_several_calls_in_one_turn_run_in_order() -> None:
    events = await run(ScriptedModel(call(expression="1+1") + call(expression="2+2"), "done"))
    assert [result.content for result in results(events)] == ["2", "4"]
    ids = [event.call_id for event in events if isinstance(event, ToolCall)]
    assert len(set(ids)) == 2


async def test_text_before_a_call_and_the_answer_after_it_are_both_kept() -> None:
    events = await run(ScriptedModel("Let me compute. " + call(), "It is 5."))
    assert finished(events).text == text_of(events) == "Let me compute. \n\nIt is 5."


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (
            call("teleport", to="Mars"),
            "There is no tool 'teleport'. There are: calculator, datetime, knowledge_search.",
        ),
        (call(expresion="2+3"), "expression: Field required"),
        (call(expression="1/0"), "Division by zero"),
        (call("knowledge_search", query="leave"), "No collection was chosen"),
    ],
)
async def test_a_faulty_call_is_told_to_the_model(written: str, told: str) -> None:
    model = ScriptedModel(written, "Sorry, I cannot.")
    events = await run(model)
    assert results(events)[0].is_error
    assert told in results(events)[0].content
    assert told in str(model.prompts[1][-1]["content"])
    assert text_of(events) == "Sorry, I cannot."


async def test_an_unreadable_call_is_told_to_the_model_and_never_shown() -> None:
    model = ScriptedModel('<tool_call>{"name": "calculator", ', "It is 5.")
    events = await run(model)
    assert "no valid JSON" in str(model.prompts[1][-1]["content"])
    assert text_of(events) == "It is 5."


async def test_the_same_call_is_not_run_again() -> None:
    runs = 0

    class NoArguments(ToolArguments):
        pass

    async def count(arguments: NoArguments, context: ToolContext) -> str:
        nonlocal runs
        runs += 1
        return "counted"

    tools = {"count": Tool("count", "counts", NoArguments, count)}
    again = '<tool_call>{"name": "count", "arguments": {}}</tool_call>'
    model = ScriptedModel(again, again, again, again, "I give up.")
    events = await run(model, tools=tools, limits=ToolLimits(max_rounds=50, max_repeats=2))
    assert runs == 1
    assert "very call before" in results(events)[-1].content
    assert text_of(events) == "I give up."
    assert len(model.requests) == 5


async def test_a_model_that_never_stops_calling_is_stopped() -> None:
    model = ScriptedModel(*(call(expression=f"{n}+1") for n in range(100)))
    events = await run(model, limits=ToolLimits(max_rounds=3))
    assert len(results(events)) == 3
    assert len(model.requests) == 4
    assert "<tool_call>" not in text_of(events)
    assert finished(events).finish_reason == "stop"
    assert finished(events).text


async def test_a_slow_tool_is_told_as_an_error() -> None:
    class NoArguments(ToolArguments):
        pass

    async def wait(arguments: NoArguments, context: ToolContext) -> str:
        await asyncio.Event().wait()
        return "never"

    tools = {"slow": Tool("slow", "waits", NoArguments, wait)}
    written = '<tool_call>{"name": "slow", "arguments": {}}</tool_call>'
    events = await run(ScriptedModel(written, "ok"), tools=tools, limits=ToolLimits(timeout_s=0.01))
    assert "did not finish" in results(events)[0].content


async def test_a_client_tool_ends_the_answer_with_its_calls() -> None:
    model = ScriptedModel(call("get_weather", city="Paris") + call("get_weather", city="Rome"))
    events = await run(model, client_tools=(WEATHER,))
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [(c.side, c.name, json.loads(c.arguments)["city"], c.index) for c in calls] == [
        ("client", "get_weather", "Paris", 0),
        ("client", "get_weather", "Rome", 1),
    ]
    assert finished(events).finish_reason == "tool_calls"
    assert len(model.requests) == 1


async def test_server_calls_beside_a_client_call_are_left_out() -> None:
    events = await run(ScriptedModel(call() + call("get_weather", city="Paris")), client_tools=(WEATHER,))
    assert [event.name for event in events if isinstance(event, ToolCall)] == ["get_weather"]
    assert results(events) == []


async def test_a_forced_call_is_bound_to_the_schema_of_its_arguments() -> None:
    model = ScriptedModel('{"expression": "2+3"}', "It is 5.")
    events = await run(model, tool_choice="calculator")
    first = model.requests[0].sampling
    assert first.json_schema == TOOLS["calculator"].parameters
    assert first.max_tokens == FORCED_CALL_TOKENS
    assert model.requests[1].sampling.json_schema is None
    assert results(events)[0].content == "5"
    assert text_of(events) == "It is 5."


async def test_a_required_call_chooses_among_all_tools() -> None:
    model = ScriptedModel('{"name": "calculator", "arguments": {"expression": "2+3"}}', "5")
    events = await run(model, tool_choice="required", client_tools=(WEATHER,))
    schema = model.requests[0].sampling.json_schema
    assert schema is not None
    assert [branch["properties"]["name"]["const"] for branch in schema["anyOf"]] == [*TOOLS, "get_weather"]
    assert results(events)[0].content == "5"


async def test_a_forced_client_call_goes_back_at_once() -> None:
    events = await run(ScriptedModel('{"city": "Paris"}'), client_tools=(WEATHER,), tool_choice="get_weather")
    (only,) = [event for event in events if isinstance(event, ToolCall)]
    assert (only.name, only.arguments) == ("get_weather", '{"city": "Paris"}')
    assert finished(events).finish_reason == "tool_calls"


async def test_a_forced_call_that_was_cut_off_is_told_to_the_model() -> None:
    model = ScriptedModel('{"expression": "2+', "It is 5.", finish_reason="length")
    await run(model, tool_choice="calculator")
    assert "cut off" in str(model.prompts[1][-1]["content"])


async def test_choice_none_offers_no_tools() -> None:
    model = ScriptedModel("Five.")
    events = await run(model, tool_choice="none")
    assert model.prompts[0] == QUESTION
    assert text_of(events) == "Five."


async def test_usage_is_the_sum_of_all_turns() -> None:
    events = await run(ScriptedModel(call(), "It is 5."))
    model = ScriptedModel("It is 5.")
    single = finished(await run(model))
    assert finished(events).usage.num_completion_tokens > single.usage.num_completion_tokens
    assert finished(events).usage.num_prompt_tokens > 2 * single.usage.num_prompt_tokens - 1


async def test_held_text_is_not_shown_and_the_loop_says_so() -> None:
    loop = make_loop(ScriptedModel("I just guess 7."), hold_first_text=True)
    events = [event async for event in loop.run(QUESTION)]
    assert text_of(events) == ""
    assert loop.is_held


async def test_after_a_call_text_is_not_held() -> None:
    loop = make_loop(ScriptedModel("Hm. " + call(), "It is 5."), hold_first_text=True)
    events = [event async for event in loop.run(QUESTION)]
    assert text_of(events) == "It is 5."
    assert not loop.is_held


async def test_leaving_the_loop_cancels_the_generation() -> None:
    model = ScriptedModel("A long answer that nobody waits for.")
    async with aclosing(make_loop(model).run(QUESTION)) as events:
        await anext(events)
    assert model.num_cancelled == 1
