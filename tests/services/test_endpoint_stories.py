"""Answers that the chat story tells, as the public endpoint shows and keeps them; conversations and metrics."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.engine import Usage
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
from services.database import Document, utc_now
from services.errors import ApiError
from services.message_sources import WITHDRAWN
from tests.services.harness import (
    HELLO,
    Running,
    ScriptedEngine,
    chat_body,
    error_of,
    events_of,
    running_endpoint,
    until_ready,
    wait_until,
    words,
)

CHUNK = StoredChunk("c1", "col", "doc", "ver", "tower.pdf", "The tower is 100 m high.", 0, 24, 0, page=3)
PASSAGE = Passage(CHUNK, 0.9)
CITED = CitedPassage(
    Citation(1, "doc", "ver", "tower.pdf", "towers", 3, 0, 24, "The tower is 100 m high.", 0.9), ((0, 9),)
)
STORY: tuple[ChatEvent, ...] = (
    RetrievalDone("How high is the tower?", (PASSAGE,), "found", is_rewritten=True),
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
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(*STORY), documents=("doc",)) as running:
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
    assert (extensions[0]["query"], extensions[0]["rewritten"]) == ("How high is the tower?", True)
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
    async with running_endpoint(tmp_path, ScriptedEngine(), story=story, documents=("doc",)) as running:
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
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(*STORY), documents=("doc",)) as running:
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
        body = chat_body(stream=True, conversation=made["id"])
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
    async with running_endpoint(tmp_path, ScriptedEngine(), story=story, documents=("doc",)) as running:
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


async def test_an_answer_whose_document_is_deleted_meanwhile_ends_without_its_text(tmp_path: Path) -> None:
    """Before the citation is shown letter by letter; what was kept of it holds no text either."""
    is_deleted = asyncio.Event()
    story = telling(STORY[0], TextDelta("It is"), is_deleted, STORY[-2], STORY[-1])
    async with running_endpoint(tmp_path, ScriptedEngine(), story=story, documents=("doc",)) as running:
        made = (await running.http.post("/v1/conversations", json={})).json()["id"]
        body = chat_body(stream=True, conversation=made, knowledge={"collections": ["towers"]})
        told = ""
        async with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for text in answer.aiter_text():
                told += text
                if "It is" in told and not is_deleted.is_set():
                    with running.database.write() as session:
                        session.get_one(Document, "doc").deleted_at = utc_now()
                    is_deleted.set()
        kept = (await running.http.get(f"/v1/conversations/{made}")).json()["messages"][-1]
    assert "The tower is 100 m high." not in told and "[DONE]" not in told
    assert events_of(told)[-1]["error"]["code"] == "documents_changed"
    assert (kept["content"], kept["citations"], kept["steps"], kept["state"]) == (WITHDRAWN, [], [], "failed")


async def test_an_answer_goes_on_while_its_documents_may_be_read(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(*STORY), documents=("doc",)) as running:
        answer = await running.chat(knowledge={"collections": ["towers"]})
        assert answer.json()["windfarm"]["citations"][0]["text"] == "The tower is 100 m high."
    async with running_endpoint(tmp_path, ScriptedEngine(), story=telling(*STORY)) as running:
        with running.database.write() as session:
            session.get_one(Document, "doc").has_own_readers = True
        key = running.accounts.create_key(running.accounts.create_user("anna"), "k")
        headers = {"authorization": f"Bearer {key}"}
        body = chat_body(knowledge={"collections": ["towers"]})
        answer = await running.http.post("/v1/chat/completions", json=body, headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (409, "documents_changed")
