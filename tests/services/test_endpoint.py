"""The public endpoint over a real socket: what it answers, refuses, streams, cancels, and says of broken streams."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.engine import GenerationChunk, Usage
from cluster.errors import ContextTooLong, EngineBusy, EngineFailed
from rag.types import Citation, Passage, StoredChunk
from services.chat_types import (
    ChatEvent,
    ChatRequest,
    CitationsReady,
    CitedPassage,
    ContextTrimmed,
    Finished,
    ModelClient,
    RetrievalDone,
    TextDelta,
    ToolCall,
    ToolResult,
)
from services.config import ChatConfig, PlatformConfig
from services.discovery import ReplicaEndpoint, encode_beat
from services.errors import ApiError
from services.model_status import ApplicationState, DeploymentState
from tests.services.harness import Running, ScriptedEngine, running_endpoint, wait_until, words

HELLO = [{"role": "user", "content": "Hello"}]
PATIENT = PlatformConfig(chat=ChatConfig(keep_alive_s=0.05))


def events_of(text: str) -> list[Any]:
    """The `data:` events of a stream, `[DONE]` as a string."""
    data = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def until_ready(running: Running) -> None:
    async def is_ready() -> bool:
        return (await running.http.get("/ready")).status_code == 200

    await wait_until(is_ready)


# The official client, unchanged


async def test_openais_client_chats(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("Hel", "lo"))) as running:
        answer = await running.openai.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert answer.id.startswith("chatcmpl-")


async def test_openais_client_streams_with_usage(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("Hel", "lo"))) as running:
        stream = await running.openai.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


async def test_openais_client_completes_text(tmp_path: Path) -> None:
    engine = ScriptedEngine(*words(" upon", " a time"))
    async with running_endpoint(tmp_path, engine) as running:
        whole = await running.openai.completions.create(model="tiny", prompt="Once")
        stream = await running.openai.completions.create(model="tiny", prompt=[1, 2], stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert whole.choices[0].text == text == " upon a time"
    assert [request.prompt_text for request in engine.requests] == ["Once", None]
    assert list(engine.requests[1].prompt_token_ids) == [1, 2]
    assert engine.requests[0].sampling.max_tokens == 16


async def test_openais_client_gets_vectors_and_models(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("x"))) as running:
        vectors = await running.openai.embeddings.create(model="embed", input=["a", "bb"])
        ids = await running.openai.embeddings.create(model="embed", input=[[7, 8, 9]], extra_body={"input_type": "raw"})
        models = [model.id async for model in running.openai.models.list()]
        tiny = await running.openai.models.retrieve("tiny")
    assert [entry.embedding for entry in vectors.data] == [[1, 1, 0, 0], [2, 1, 0, 0]]
    assert vectors.usage.total_tokens == 3
    assert [entry.embedding for entry in ids.data] == [[3, 1, 0, 0]]
    assert models == ["tiny", "embed"]
    assert (tiny.id, tiny.model_extra["max_context"], tiny.model_extra["ready"]) == ("tiny", 64, True)


async def test_openais_client_is_told_which_inputs_were_cut(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        vectors = await running.openai.embeddings.create(model="embed", input=["short", "long " * 50, "short"])
        whole = await running.openai.embeddings.create(model="embed", input="short")
    assert vectors.model_extra == {"windfarm": {"truncated": [1]}}
    assert not whole.model_extra


async def test_openais_client_raises_its_own_errors(tmp_path: Path) -> None:
    engine = ScriptedEngine(EngineBusy("All slots are taken."))
    async with running_endpoint(tmp_path, engine) as running:
        create = running.openai.chat.completions.create
        with pytest.raises(openai.NotFoundError, match=r"There is no model 'huge'\. There are: tiny\."):
            await create(model="huge", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await create(model="tiny", messages=HELLO, temperature=9)
        with pytest.raises(openai.InternalServerError, match="All slots are taken"):
            await create(model="tiny", messages=HELLO)
        with pytest.raises(openai.AuthenticationError, match="api key is wrong"):
            await running.openai.with_options(api_key="wf-wrong").models.list()


async def test_openais_client_raises_when_a_stream_breaks(tmp_path: Path) -> None:
    engine = ScriptedEngine(GenerationChunk((1,), "Hel"), EngineFailed("The engine stumbled."))
    async with running_endpoint(tmp_path, engine) as running:
        stream = await running.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="The engine stumbled"):
            async for _ in stream:
                pass


# Keys, hosts, paths


@pytest.mark.parametrize(
    ("header", "code"),
    [(None, "missing_api_key"), ("Bearer wf-wrong", "invalid_api_key"), ("Basic abc", "invalid_api_key")],
)
async def test_without_a_right_key_nothing_is_told(tmp_path: Path, header: str | None, code: str) -> None:
    headers = {"authorization": header} if header else {}
    async with running_endpoint(tmp_path) as running, httpx.AsyncClient(base_url=running.url) as stranger:
        for path in ("/v1/models", "/v1/me", "/v1/status", "/metrics", "/v1/collections", "/v1/conversations"):
            answer = await stranger.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert error_of(answer)["code"] == code
        answer = await stranger.post("/v1/chat/completions", content=b"{", headers=headers)
        assert answer.status_code == 401  # the body is not even read


async def test_health_and_readiness_are_open_and_tell_a_status_alone(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, proves=True) as running, httpx.AsyncClient(base_url=running.url) as stranger:
        assert (await stranger.get("/health")).json() == {"status": "ok"}
        answer = await stranger.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
        head = await stranger.head("/health")
        assert (head.status_code, head.content) == (200, b"")


async def test_ready_follows_a_real_token_and_a_real_vector(tmp_path: Path) -> None:
    engine = ScriptedEngine(*words("x"))
    async with running_endpoint(tmp_path, engine, proves=True) as running:
        await until_ready(running)
        assert engine.requests[0].sampling.max_tokens == 1
        assert (await running.http.get("/v1/status")).json()["ready"] is True
        await running.services[0].stop(drain_s=0)
        await running.directory.refresh()
        assert (await running.http.get("/ready")).status_code == 503


async def test_a_foreign_host_name_is_refused_on_loopback(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        answer = await running.http.get("/v1/models", headers={"host": "evil.example:8000"})
        assert (answer.status_code, error_of(answer)["code"]) == (421, "unknown_host")
        for name in ("localhost:1", "127.0.0.1", "[::1]:8000"):
            assert (await running.http.get("/v1/models", headers={"host": name})).status_code == 200


async def test_no_other_web_page_may_read_answers(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        answer = await running.http.get("/v1/models", headers={"origin": "https://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_unknown_paths_and_methods_are_named(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        answer = await running.http.get("/v1/nothing")
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_path")
        answer = await running.http.get("/v1/chat/completions")
        assert (answer.status_code, error_of(answer)["message"]) == (405, "GET is not possible here, only POST.")


async def test_keys_are_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running_endpoint(tmp_path, ScriptedEngine(*words("x"))) as running:
        await running.chat(user="client-7")
        await running.http.get("/v1/models", headers={"authorization": "Bearer wf-guess"})
        assert running.key not in caplog.text
    assert "wf-guess" not in caplog.text
    assert "client_user=client-7" in caplog.text


async def test_a_revoked_key_is_refused_within_seconds(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        me = (await running.http.get("/v1/me")).json()
        running.accounts.revoke_key(me["key_id"])

        async def is_refused() -> bool:
            return (await running.http.get("/v1/me")).status_code == 401

        await wait_until(is_refused)


# Bad input


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "empty_body"),
        (b"not json", "invalid_json"),
        (b'{"model": "tiny", "messages": "hi"}', "invalid_type"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temprature": 1}', "unknown_parameter"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "missing_required_parameter"),
    ],
)
async def test_bad_bodies_get_400_with_a_code(tmp_path: Path, body: bytes, code: str) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        answer = await running.http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert answer.headers["x-request-id"].startswith("req_")


async def test_a_too_long_body_gets_413_and_other_media_415(tmp_path: Path) -> None:
    config = PlatformConfig(max_body_mib=0.01)
    async with running_endpoint(tmp_path, ScriptedEngine(), config=config) as running:
        answer = await running.chat(messages=[{"role": "user", "content": "x" * 15_000}])
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_long")
        answer = await running.http.post("/v1/chat/completions", data={"model": "tiny"})
        assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")


async def test_an_answer_beyond_the_context_names_both_numbers(tmp_path: Path) -> None:
    refusal = ContextTooLong("The prompt has 7 tokens and max_tokens asks for 99 more, but the context is 64 tokens.")
    async with running_endpoint(tmp_path, ScriptedEngine(refusal)) as running:
        for stream in (False, True):
            answer = await running.chat(max_tokens=99, stream=stream)
            assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
            assert "99" in error_of(answer)["message"]
            assert "64" in error_of(answer)["message"]


async def test_our_own_answer_limit_gives_way_where_the_context_leaves_less(tmp_path: Path) -> None:
    class Narrow(ScriptedEngine):
        async def generate(self, request: Any) -> AsyncIterator[GenerationChunk]:
            if request.sampling.max_tokens is not None:
                raise ContextTooLong("Too much.", param="max_tokens")
            async for chunk in super().generate(request):
                yield chunk

    async with running_endpoint(tmp_path, Narrow(*words("fits"))) as running:
        answer = await running.chat()
    assert answer.json()["choices"][0]["message"]["content"] == "fits"


async def test_a_model_that_starts_is_503_with_what_serve_says(tmp_path: Path) -> None:
    pending = DeploymentState("ModelServer", "UPDATING", "It needs 4 CPUs, 2 are there.", {"STARTING": 1})
    states = {"llm-big": ApplicationState("llm-big", "DEPLOYING", "", (pending,))}
    async with running_endpoint(tmp_path, ScriptedEngine(), states=states) as running:
        answer = await running.chat(model="big")
        listed = (await running.http.get("/v1/models")).json()["data"]
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_ready")
    assert "'llm-big' is DEPLOYING. Ray Serve says: It needs 4 CPUs, 2 are there." in error_of(answer)["message"]
    assert answer.headers["retry-after"] == "5"
    assert [(model["id"], model.get("ready")) for model in listed] == [("big", False), ("tiny", True), ("embed", None)]


async def test_the_embedding_model_does_not_chat_and_chat_models_do_not_embed(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        answer = await running.chat(model="embed")
        assert (answer.status_code, error_of(answer)["param"]) == (400, "model")
        answer = await running.http.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
        assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
        answer = await running.http.post("/v1/embeddings", json={"model": "embed", "input": "a", "dimensions": 3})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "dimensions")


# Streams


async def test_a_client_that_goes_away_cancels_its_generation(tmp_path: Path) -> None:
    for stream in (True, False):
        engine = ScriptedEngine(GenerationChunk((1,), "Hel"), asyncio.Event())
        async with running_endpoint(tmp_path, engine) as running:
            request = asyncio.create_task(running.chat(stream=stream))
            await wait_until(lambda: engine.requests)  # noqa: B023
            engine.was_closed.clear()
            request.cancel()
            await asyncio.wait_for(engine.was_closed.wait(), 5)


async def test_a_lost_replica_is_an_error_event_and_never_done(tmp_path: Path) -> None:
    engine = ScriptedEngine(GenerationChunk((1,), "Hel"), asyncio.Event())
    async with (
        running_endpoint(tmp_path, engine) as running,
        running.http.stream("POST", "/v1/chat/completions", json=_chat(stream=True)) as answer,
    ):
        lines = answer.aiter_lines()
        while "Hel" not in await anext(lines):
            pass
        await running.services[0].stop(drain_s=0)
        rest = "\n".join([line async for line in lines])
    assert events_of(rest)[-1]["error"]["code"] == "stream_lost"
    assert "[DONE]" not in rest


async def test_a_whole_answer_that_lost_its_replica_is_an_error(tmp_path: Path) -> None:
    engine = ScriptedEngine(GenerationChunk((1,), "Hel"), asyncio.Event())
    async with running_endpoint(tmp_path, engine) as running:
        request = asyncio.create_task(running.chat())
        await wait_until(lambda: engine.requests)
        await running.services[0].stop(drain_s=0)
        answer = await request
    assert (answer.status_code, error_of(answer)["code"]) == (502, "stream_lost")


async def test_a_silent_stream_gets_comments_that_clients_ignore(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    engine = ScriptedEngine(go_on, *words("late"))
    async with (
        running_endpoint(tmp_path, engine, config=PATIENT) as running,
        running.http.stream("POST", "/v1/chat/completions", json=_chat(stream=True)) as answer,
    ):
        lines = answer.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        go_on.set()
        rest = "\n".join([line async for line in lines])
    assert events_of(rest)[-1] == "[DONE]"
    assert "late" in rest


async def test_a_failure_after_comments_is_an_error_event(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    engine = ScriptedEngine(go_on, EngineBusy("The queue is full."))
    async with (
        running_endpoint(tmp_path, engine, config=PATIENT) as running,
        running.http.stream("POST", "/v1/chat/completions", json=_chat(stream=True)) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        go_on.set()
        rest = "\n".join([line async for line in lines])
    assert events_of(rest) == [
        {
            "error": {
                "message": "The queue is full.",
                "type": "service_unavailable",
                "param": None,
                "code": "engine_busy",
            }
        }
    ]


async def test_a_busy_engine_is_503_with_retry_after_before_the_stream_begins(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(EngineBusy("The queue is full."))) as running:
        answer = await running.chat(stream=True)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_busy")
    assert answer.headers["retry-after"] == "1"


async def test_a_replica_that_cannot_be_reached_is_replaced_by_another(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("ok"))) as running:
        for number in range(3):
            gone = ReplicaEndpoint(f"gone{number}", "llm-tiny", "http://127.0.0.1:9", 1, model="tiny")
            running.beats.put(gone.key, encode_beat(gone))
        await running.directory.refresh()
        answers = [await running.chat() for _ in range(8)]
    assert {answer.status_code for answer in answers} == {200}


async def test_a_full_replica_passes_its_request_to_one_with_room(tmp_path: Path) -> None:
    full, free = ScriptedEngine(EngineBusy("full")), ScriptedEngine(*words("ok"))
    async with running_endpoint(tmp_path, full, free) as running:
        answers = [await running.chat() for _ in range(8)]
    assert {answer.status_code for answer in answers} == {200}


async def test_when_no_replica_can_be_reached_the_client_hears_to_try_again(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        gone = ReplicaEndpoint("gone", "llm-tiny", "http://127.0.0.1:9", 1, model="tiny")
        running.beats.put(gone.key, encode_beat(gone))
        await running.directory.refresh()
        answer = await running.chat()
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_unreachable")


# Chats with a story


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO} | fields


CHUNK = StoredChunk("c1", "col", "doc", "ver", "tower.pdf", "The tower is 100 m high.", 0, 24, 0, page=3)
PASSAGE = Passage(CHUNK, 0.9)
CITED = CitedPassage(
    Citation(1, "doc", "ver", "tower.pdf", "towers", 3, 0, 24, "The tower is 100 m high.", 0.9), ((0, 9),)
)
STORY: tuple[ChatEvent, ...] = (
    RetrievalDone("How high?", (PASSAGE,), "found"),
    ContextTrimmed(2, 1, "The context is 64 tokens."),
    ToolCall("call_1", "calculator", '{"expression": "1+1"}', "server"),
    ToolResult("call_1", "calculator", "2"),
    TextDelta("It is 100 m."),
    CitationsReady((CITED,), "It is 100 m [1].", "found"),
    Finished("stop", Usage(9, 4), "It is 100 m [1]."),
)


def telling(*events: ChatEvent | Exception | asyncio.Event) -> Any:
    """A chat story that is known beforehand."""
    seen: list[ChatRequest] = []

    async def story(request: ChatRequest, model: ModelClient) -> AsyncIterator[ChatEvent]:
        seen.append(request)
        for event in events:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, asyncio.Event):
                await event.wait()
            else:
                yield event

    story.seen = seen  # type: ignore[attr-defined]
    return story


async def test_a_story_is_streamed_as_chunks_with_windfarms_events(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(*STORY)) as running:
        answer = await running.chat(stream=True, knowledge={"collections": ["towers"]})
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    assert all(event["choices"][0]["index"] == 0 for event in events[:-1])
    extensions = [event["windfarm"] for event in events[:-1] if "windfarm" in event]
    assert [extension["event"] for extension in extensions] == [
        "retrieval",
        "context",
        "tool_call",
        "tool_result",
        "citations",
    ]
    assert extensions[1]["omitted"] == {"messages": 2, "passages": 1}
    assert extensions[4]["answer"] == "It is 100 m [1]."
    assert extensions[4]["citations"] == [
        {
            "number": 1,
            "document_id": "doc",
            "version_id": "ver",
            "document": "tower.pdf",
            "collection": "towers",
            "page": 3,
            "start": 0,
            "end": 24,
            "text": "The tower is 100 m high.",
            "score": 0.9,
            "answer_spans": [[0, 9]],
        }
    ]


async def test_a_whole_story_has_its_extension_at_the_top(tmp_path: Path) -> None:
    story = telling(*STORY)
    async with running_endpoint(tmp_path, ScriptedEngine(), story=story) as running:
        answer = (await running.chat(knowledge={"collections": ["towers"], "top_k": 3, "threshold": 0.5})).json()
        me = (await running.http.get("/v1/me")).json()
    assert answer["choices"][0]["message"]["content"] == "It is 100 m [1]."
    assert answer["usage"]["total_tokens"] == 13
    assert answer["windfarm"]["evidence"] == "found"
    assert answer["windfarm"]["citations"][0]["number"] == 1
    assert answer["windfarm"]["context"]["omitted"] == {"messages": 2, "passages": 1}
    (request,) = story.seen
    assert (request.knowledge.collections, request.knowledge.top_k, request.knowledge.threshold) == (
        ("towers",),
        3,
        0.5,
    )
    assert request.actor == me["id"]


async def test_calls_of_the_clients_own_tools_have_openais_shape(tmp_path: Path) -> None:
    story = telling(ToolCall("call_1", "look", '{"at": "sky"}', "client"), Finished("tool_calls", Usage(5, 5), ""))
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    async with running_endpoint(tmp_path, ScriptedEngine(), story=story) as running:
        whole = await running.openai.chat.completions.create(model="tiny", messages=HELLO, tools=tools)
        stream = await running.openai.chat.completions.create(model="tiny", messages=HELLO, tools=tools, stream=True)
        chunks = [chunk async for chunk in stream]
    (call,) = whole.choices[0].message.tool_calls
    assert (call.id, call.function.name, call.function.arguments) == ("call_1", "look", '{"at": "sky"}')
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    (delta,) = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert (delta.index, delta.id, delta.function.name) == (0, "call_1", "look")
    assert story.seen[0].client_tools == tuple(tools)


async def test_a_conversation_keeps_question_and_answer(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(*STORY)) as running:
        made = (await running.http.post("/v1/conversations", json={})).json()
        await running.chat(conversation=made["id"], knowledge={"collections": ["towers"]}, stream=True)
        kept = (await running.http.get(f"/v1/conversations/{made['id']}")).json()
    question, answer = kept["messages"]
    assert (question["role"], question["content"]) == ("user", "Hello")
    assert (answer["content"], answer["state"], answer["model"]) == ("It is 100 m [1].", "complete", "tiny")
    assert answer["citations"][0]["document"] == "tower.pdf"
    assert [step["event"] for step in answer["steps"]] == [
        "retrieval",
        "context",
        "tool_call",
        "tool_result",
        "evidence",
    ]
    assert (kept["title"], kept["model"], kept["collections"]) == ("Hello", "tiny", ["towers"])


async def test_a_stopped_answer_is_kept_as_far_as_it_came(tmp_path: Path) -> None:
    story = telling(TextDelta("It is "), asyncio.Event())
    async with running_endpoint(tmp_path, ScriptedEngine(), story=story) as running:
        made = (await running.http.post("/v1/conversations", json={})).json()
        body = _chat(stream=True, conversation=made["id"])
        async with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if "It is" in line:
                    break
        kept = await _messages(running, made["id"], 2)
    assert (kept[1]["content"], kept[1]["state"]) == ("It is ", "stopped")


async def test_a_failed_answer_is_kept_as_failed_and_told(tmp_path: Path) -> None:
    failure = ApiError(503, "service_unavailable", "store_unavailable", "The store is away.")
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(TextDelta("It"), failure)) as running:
        made = (await running.http.post("/v1/conversations", json={})).json()
        answer = await running.chat(conversation=made["id"], stream=True)
        kept = await _messages(running, made["id"], 2)
    assert events_of(answer.text)[-1]["error"]["code"] == "store_unavailable"
    assert (kept[1]["content"], kept[1]["state"]) == ("It", "failed")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_collection_is_a_404_with_the_stores_words(tmp_path: Path, stream: bool) -> None:
    refusal = ApiError(404, "not_found_error", "unknown_collection", "There is no collection named 'tower'.")
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(refusal)) as running:
        answer = await running.chat(stream=stream, knowledge={"collections": ["tower"]})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_collection")
    assert "tower" in error_of(answer)["message"]


async def test_an_unknown_conversation_is_refused_before_the_model_is_asked(tmp_path: Path) -> None:
    story = telling(*STORY)
    async with running_endpoint(tmp_path, ScriptedEngine(), story=story) as running:
        answer = await running.chat(conversation="conv_nothing", stream=True)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "conversation_not_found")
    assert not story.seen


async def test_a_bug_of_ours_is_a_500_with_the_request_id(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(KeyError("secret"))) as running:
        answer = await running.chat(windfarm_tools=["datetime"])
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] in error_of(answer)["message"]
    assert "secret" not in answer.text


async def test_conversations_are_made_changed_listed_and_deleted(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("a"))) as running:
        made = await running.http.post("/v1/conversations", json={"title": "Towers"})
        assert made.status_code == 201
        path = f"/v1/conversations/{made.json()['id']}"
        assert (await running.http.patch(path, json={"title": "High towers"})).json()["title"] == "High towers"
        assert error_of(await running.http.patch(path, json={"titel": "x"}))["code"] == "unknown_parameter"
        await running.chat(conversation=made.json()["id"])
        question = (await running.http.get(path)).json()["messages"][0]["id"]
        assert (await running.http.delete(f"{path}/messages/{question}")).json()["num_messages"] == 2
        listed = (await running.http.get("/v1/conversations")).json()["data"]
        assert [entry["title"] for entry in listed] == ["High towers"]
        assert (await running.http.delete(path)).json()["deleted"] is True
        assert (await running.http.get(path)).status_code == 404


async def test_metrics_count_requests_tokens_and_replicas(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("a", "b")), proves=True) as running:
        await until_ready(running)
        await running.chat(stream=True)
        await running.chat(model="made-up-name")
        text = (await running.http.get("/metrics")).text
    chat = 'route="/v1/chat/completions"'
    assert f'windfarm_requests_total{{method="POST",model="tiny",{chat},status="200"}} 1.0' in text
    assert f'windfarm_requests_total{{method="POST",model="",{chat},status="404"}} 1.0' in text
    assert 'windfarm_tokens_total{kind="completion",model="tiny"} 2.0' in text
    assert 'windfarm_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'windfarm_replica_ready{app="llm-tiny",model="tiny",replica="r0"} 1.0' in text
    assert "made-up-name" not in text


async def _messages(running: Running, conversation: str, number: int) -> list[dict[str, Any]]:
    """The messages of a conversation, as soon as there are so many."""
    messages: list[dict[str, Any]] = []

    async def has_all() -> bool:
        messages[:] = (await running.http.get(f"/v1/conversations/{conversation}")).json()["messages"]
        return len(messages) >= number

    await wait_until(has_all)
    return messages
