"""Tools across a seam: a replica is lost in the middle of a tool call's arguments, and nobody can tell."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.engine import GenerationChunk, GenerationRequest, Usage
from services.chat import make_story
from services.chat_types import Searcher
from services.config import PlatformConfig
from tests.chaos.hash_engine import HashEngine
from tests.chaos.replicas import PausingEngine, kill_the_paused
from tests.services.harness import Running, chat_body, events_of, running_endpoint

ARGUMENTS = '{"expression": "6 * 7"}'
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ANSWER = "It is 42."
NUM_PROMPT_TOKENS = 3


class Reciter(HashEngine):
    """Calls a tool; with its result it answers. A token is a character."""

    def __init__(self, call: str) -> None:
        super().__init__(max_context=100_000)
        self.info = replace(self.info, continues_guided_answers=True)
        self._call = call

    def text(self, request: GenerationRequest) -> str:
        return ANSWER if "<tool_response>" in str((request.messages or [{}])[-1]["content"]) else self._call

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        text, num_sent = self.text(request), 0
        if request.delivered is not None:
            num_sent = request.delivered.num_characters
            assert "".join(map(chr, request.delivered.token_ids)) == text[:num_sent]
        for character in text[num_sent:]:
            yield GenerationChunk((ord(character),), character)
        yield GenerationChunk(finish_reason="stop", usage=Usage(NUM_PROMPT_TOKENS, len(text)))


async def answer_across_a_seam(folder: Path, call: str, **body: Any) -> str:
    """The answer to a chat whose replica is killed when half of the call's arguments have been sent."""
    reciter, num_chunks = Reciter(call), call.index("6 *") + 1
    story = make_story(PlatformConfig(), cast(Searcher, None), None)
    async with running_endpoint(folder, story=story) as running:
        engines = [PausingEngine(reciter, num_chunks) for _ in range(2)]
        for number, engine in enumerate(engines):
            await running.add_model(engine, replica_id=f"r{number}")
        asked = asyncio.create_task(running.http.post("/v1/chat/completions", json=chat_body(max_tokens=200, **body)))
        await kill_the_paused(running, engines)
        answer = await asked
        await moved_once(running)
    (rest,) = [request for engine in engines for request in engine.rests]
    assert rest.delivered is not None
    assert len(rest.delivered.token_ids) == num_chunks
    assert answer.status_code == 200, answer.text
    return answer.text


async def moved_once(running: Running) -> None:
    metrics = (await running.http.get("/metrics")).text
    assert 'windfarm_streams_moved_total{model="tiny"} 1.0' in metrics


@pytest.mark.parametrize(
    ("choice", "call"),
    [
        ("auto", f'Well. <tool_call>{{"name": "calculator", "arguments": {ARGUMENTS}}}</tool_call>'),
        ("required", f'{{"name": "calculator", "arguments": {ARGUMENTS}}}'),
        ({"type": "function", "function": {"name": "calculator"}}, ARGUMENTS),
    ],
)
async def test_a_tool_of_the_server_runs_once_with_the_whole_arguments(tmp_path: Path, choice: Any, call: str) -> None:
    body = {"windfarm_tools": ["calculator"], "tool_choice": choice, "stream_options": {"include_usage": True}}
    events = events_of(await answer_across_a_seam(tmp_path, call, stream=True, **body))
    assert events[-1] == "[DONE]"
    steps = [event["windfarm"] for event in events[:-1] if "windfarm" in event]
    (called,) = [step for step in steps if step["event"] == "tool_call"]
    (result,) = [step for step in steps if step["event"] == "tool_result"]
    assert (called["name"], called["arguments"], result["content"]) == ("calculator", ARGUMENTS, "42")
    shown = "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1] if event["choices"])
    assert shown == (f"Well. \n\n{ANSWER}" if choice == "auto" else ANSWER)
    (usage,) = [event["usage"] for event in events[:-1] if event.get("usage")]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2 * NUM_PROMPT_TOKENS, len(call) + len(ANSWER))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_of_the_client_is_handed_over_once(tmp_path: Path, stream: bool) -> None:
    call = f'<tool_call>{{"name": "look", "arguments": {ARGUMENTS}}}</tool_call>'
    text = await answer_across_a_seam(tmp_path, call, tools=[LOOK], stream=stream)
    if stream:
        choices = [event["choices"][0] for event in events_of(text)[:-1] if event["choices"]]
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls") or ()]
        reasons = {choice["finish_reason"] for choice in choices} - {None}
    else:
        whole = json.loads(text)
        calls, reasons = whole["choices"][0]["message"]["tool_calls"], {whole["choices"][0]["finish_reason"]}
        assert whole["usage"]["completion_tokens"] == len(call)
    (called,) = calls
    assert (called["function"]["name"], called["function"]["arguments"]) == ("look", ARGUMENTS)
    assert reasons == {"tool_calls"}
