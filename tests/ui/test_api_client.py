"""The page's client against a real connection: events, errors, cut streams, leaving early."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.ui.conftest import Serve
from ui.api_client import ApiClient, ApiError, open_http
from ui.api_json import collection, conversation, windfarm_events
from ui.records import (
    ChatEvent,
    Cited,
    ContextTrimmed,
    Finished,
    Message,
    Retrieved,
    TextAdded,
    ToolAnswered,
    ToolCalled,
)

QUESTION = [Message("user", "What is said?")]


def data(value: Any) -> str:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def text(content: str, finish_reason: str | None = None) -> str:
    return data({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]})


def extension(**event: Any) -> str:
    return data({"choices": [{"index": 0, "delta": {}, "finish_reason": None}], "windfarm": event})


def streaming(*parts: str) -> Starlette:
    async def chat(request: Request) -> Response:
        async def body() -> AsyncIterator[str]:
            for part in parts:
                yield part

        return StreamingResponse(body(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


def answering(path: str, response: Response, method: str = "GET") -> Starlette:
    return Starlette(routes=[Route(path, lambda request: response, methods=[method])])


async def events_of(address: str, **options: Any) -> list[ChatEvent]:
    async with open_http(address) as http:
        return [event async for event in ApiClient(http, "wf-key").chat(QUESTION, model="tiny", **options)]


async def test_text_arrives_in_pieces_and_ends_with_finished(serve: Serve) -> None:
    app = streaming(": keep-alive\n\n", text("Hel"), text("lo"), text("", "stop"), data("[DONE]"))
    assert await events_of(serve(app)) == [TextAdded("Hel"), TextAdded("lo"), Finished("stop")]


async def test_windfarm_events_become_typed_ones(serve: Serve) -> None:
    citation = {
        "number": 1,
        "document_id": "doc_1",
        "version_id": "ver_1",
        "document": "memo.pdf",
        "collection": "memos",
        "page": 2,
        "start": 10,
        "end": 14,
        "text": "four",
        "score": 0.9,
    }
    app = streaming(
        extension(event="retrieval", query="q", passages=[{}, {}], evidence="found"),
        extension(event="context", omitted={"messages": 3, "passages": 1}, reason="too long"),
        extension(event="tool_call", id="c", name="calculator", arguments='{"expression":"1+1"}'),
        extension(event="tool_result", id="c", name="calculator", content="2", is_error=False),
        text("four"),
        extension(event="citations", citations=[citation], answer="four [1]", evidence="found"),
        extension(event="of the future"),
        data("[DONE]"),
    )
    retrieved, trimmed, called, answered, _, cited, finished = await events_of(serve(app))
    assert retrieved == Retrieved(2)
    assert isinstance(trimmed, ContextTrimmed) and trimmed.trimmed.num_messages == 3
    assert called == ToolCalled("c", "calculator", '{"expression":"1+1"}')
    assert answered == ToolAnswered("c", "calculator", "2", False)
    assert isinstance(cited, Cited) and cited.answer == "four [1]" and cited.citations[0].document == "memo.pdf"
    assert finished == Finished()


def test_a_rewritten_question_is_told_and_any_other_is_not() -> None:
    event = {"event": "retrieval", "query": "And is it paid? Parental leave", "passages": [{}]}
    assert windfarm_events(event | {"rewritten": True}) == [Retrieved(1, "And is it paid? Parental leave")]
    assert windfarm_events(event | {"rewritten": False}) == [Retrieved(1)]
    kept = {"id": "conv", "messages": [{"role": "assistant", "steps": [event | {"rewritten": True}]}]}
    assert conversation(kept).messages[0].query == "And is it paid? Parental leave"


def test_error_rates_of_a_tuned_collection_become_a_sentence() -> None:
    errors = {"wrong_refusals": 0.051, "wrong_answers_far": 0.0, "wrong_answers_near": None}
    tuned = collection({"name": "handbook", "tuning": {"num_judged": 80, "errors": errors}})
    assert tuned.refusals == (
        "Measured on 80 questions: refuses 5 % of questions that it answers, answers 0 % of questions on other topics."
    )
    assert collection({"name": "handbook", "tuning": None}).refusals == ""


async def test_a_stream_without_done_is_told_as_cut(serve: Serve) -> None:
    with pytest.raises(ApiError, match="cut off") as raised:
        await events_of(serve(streaming(text("half an"))))
    assert raised.value.code == "cut"


async def test_a_connection_that_breaks_in_the_stream_is_told_in_words(serve: Serve) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text("half").encode(), "more_body": True})
        raise ConnectionAbortedError

    with pytest.raises(ApiError, match="broke before the answer was complete"):
        await events_of(serve(app))


async def test_an_error_event_ends_the_stream_with_its_message(serve: Serve) -> None:
    app = streaming(text("half"), data({"error": {"message": "The model has died.", "code": "engine_dead"}}))
    with pytest.raises(ApiError, match="The model has died") as raised:
        await events_of(serve(app))
    assert raised.value.code == "engine_dead"


async def test_damaged_json_is_told_as_damaged(serve: Serve) -> None:
    with pytest.raises(ApiError, match="damaged"):
        await events_of(serve(streaming("data: {oops\n\n")))


async def test_a_refusal_carries_the_servers_message_and_code(serve: Serve) -> None:
    refusal = JSONResponse({"error": {"message": "All slots are taken.", "code": "engine_busy"}}, 503)
    with pytest.raises(ApiError, match="All slots are taken") as raised:
        await events_of(serve(answering("/v1/chat/completions", refusal, "POST")))
    assert (raised.value.code, raised.value.status) == ("engine_busy", 503)


async def test_a_wrong_key_says_how_to_find_the_right_one(serve: Serve) -> None:
    refusal = JSONResponse({"error": {"message": "Unknown key.", "code": "invalid_api_key"}}, 401)
    async with open_http(serve(answering("/v1/me", refusal))) as http:
        with pytest.raises(ApiError, match="windfarm key") as raised:
            await ApiClient(http, "wrong").me()
    assert raised.value.is_wrong_key


async def test_no_server_is_told_as_restarting() -> None:
    async with open_http("http://127.0.0.1:9") as http:
        with pytest.raises(ApiError, match="may be restarting"):
            await ApiClient(http, "key").me()


async def test_an_error_that_is_not_json_still_becomes_a_sentence(serve: Serve) -> None:
    async with open_http(serve(answering("/v1/me", PlainTextResponse("<html>", 503)))) as http:
        with pytest.raises(ApiError, match="starting or restarting"):
            await ApiClient(http, "key").me()


async def test_leaving_the_stream_closes_the_connection(serve: Serve) -> None:
    left = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text("on and on").encode(), "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async with open_http(serve(app)) as http:
        async with aclosing(ApiClient(http, "key").chat(QUESTION, model="tiny")) as stream:
            assert await anext(stream) == TextAdded("on and on")
        assert await asyncio.to_thread(left.wait, 10)


async def test_the_request_holds_what_was_chosen_and_nothing_else(serve: Serve) -> None:
    seen: list[Any] = []

    async def chat(request: Request) -> Response:
        seen.append((await request.json(), request.headers["authorization"]))
        return PlainTextResponse(data("[DONE]"), media_type="text/event-stream")

    address = serve(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])]))
    await events_of(address)
    await events_of(address, collections=["memos"], tools=["calculator"], conversation_id="conv_1")
    plain = {"model": "tiny", "messages": [{"role": "user", "content": "What is said?"}], "stream": True}
    assert seen[0] == (plain, "Bearer wf-key")
    chosen = {
        "knowledge": {"collections": ["memos"]},
        "windfarm_tools": ["calculator"],
        "conversation": "conv_1",
    }
    assert seen[1][0] == plain | chosen


async def test_a_stored_conversation_comes_back_with_steps_notices_and_evidence(serve: Serve) -> None:
    steps = [
        {"event": "retrieval", "query": "q", "passages": [], "evidence": "none"},
        {"event": "context", "omitted": {"messages": 1, "passages": 0}, "reason": "long"},
        {"event": "tool_call", "id": "a", "name": "datetime", "arguments": "{}"},
        {"event": "tool_result", "id": "a", "name": "datetime", "content": "now", "is_error": False},
        {"event": "tool_call", "id": "b", "name": "calculator", "arguments": "{}"},
    ]
    stored = {
        "id": "conv_1",
        "title": "T",
        "model": "tiny",
        "collections": ["memos"],
        "messages": [{"id": "msg_1", "role": "assistant", "content": "A", "steps": steps, "state": "stopped"}],
    }
    async with open_http(serve(answering("/v1/conversations/{id}", JSONResponse(stored)))) as http:
        conversation = await ApiClient(http, "key").conversation("conv_1")
    message = conversation.messages[0]
    assert conversation.collections == ("memos",)
    assert (message.evidence, message.state) == ("none", "stopped")
    assert message.trimmed is not None and message.trimmed.num_messages == 1
    assert [(step.name, step.result) for step in message.steps] == [("datetime", "now"), ("calculator", None)]


async def test_only_chat_models_are_offered(serve: Serve) -> None:
    models = {"data": [{"id": "tiny", "kind": "chat"}, {"id": "embed", "kind": "embedding"}]}
    async with open_http(serve(answering("/v1/models", JSONResponse(models)))) as http:
        assert await ApiClient(http, "key").models() == ["tiny"]


async def test_an_upload_is_sent_under_its_own_name_and_its_job_is_followed(serve: Serve, tmp_path: Path) -> None:
    seen: list[str] = []

    async def upload(request: Request) -> Response:
        form = await request.form()
        seen.append(f"{request.path_params['name']}/{form['file'].filename}")  # type: ignore[union-attr]
        return JSONResponse({"job": {"id": "job_1", "filename": "ä b.txt", "state": "queued"}}, 202)

    failed = {"id": "job_1", "filename": "ä b.txt", "state": "failed", "error": {"message": "It is empty."}}
    routes = [
        Route("/v1/collections/{name}/documents", upload, methods=["POST"]),
        Route("/v1/jobs/{id}", lambda request: JSONResponse(failed)),
    ]
    file = tmp_path / "temporary"
    file.write_text("text")
    async with open_http(serve(Starlette(routes=routes))) as http:
        client = ApiClient(http, "key")
        job = await client.upload("my memos", file, "ä b.txt")
        finished = await client.job(job.id)
    assert seen == ["my memos/ä b.txt"]
    assert not job.is_finished
    assert finished.is_finished and finished.error == "It is empty."
