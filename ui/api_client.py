"""The one file that knows windfarm's address and the formats that it speaks: JSON, errors, streams of answers.

Every call carries the key of the person who asks; nothing of it is kept here. A failed call raises `ApiError` with a
sentence for people. Leaving a stream early (closing the iterator) closes the connection, which stops the generation.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from ui.records import (
    Account,
    ChatEvent,
    Citation,
    Cited,
    Collection,
    ContextTrimmed,
    Conversation,
    Document,
    Finished,
    Job,
    Message,
    Retrieved,
    TextAdded,
    ToolAnswered,
    ToolCalled,
    ToolStep,
    Trimmed,
)

# The server sends a comment every few seconds while it works, so silence of a minute means that it is gone.
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)

Json = dict[str, Any]


class ApiError(Exception):
    """A call that failed. `message` is a sentence for people; `code` is stable for programs."""

    def __init__(self, message: str, *, code: str = "", status: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status

    @property
    def is_wrong_key(self) -> bool:
        return self.status == HTTPStatus.UNAUTHORIZED


class ApiClient:
    """Calls one windfarm with one key. `http` may be shared between clients: it holds connections, never keys."""

    def __init__(self, http: httpx.AsyncClient, key: str) -> None:
        self._http = http
        self._headers = {"authorization": f"Bearer {key}"}

    # Account and models

    async def me(self) -> Account:
        body = await self._call("GET", "/v1/me")
        user = body.get("user")
        name = user.get("name") if isinstance(user, dict) else user or body.get("name")
        return Account(name=str(name or "you"))

    async def models(self) -> list[str]:
        """Names of the chat models."""
        entries = (await self._call("GET", "/v1/models"))["data"]
        return [entry["id"] for entry in entries if "embed" not in str(entry.get("kind", entry.get("type", "")))]

    # Collections and documents

    async def collections(self) -> list[Collection]:
        body = await self._call("GET", "/v1/collections")
        return [_collection(entry) for entry in _listed(body, "collections")]

    async def create_collection(self, name: str) -> Collection:
        body = await self._call("POST", "/v1/collections", json={"name": name})
        return _collection(body.get("collection", body))

    async def delete_collection(self, name: str) -> None:
        await self._call("DELETE", f"/v1/collections/{_part(name)}")

    async def documents(self, collection: str) -> list[Document]:
        body = await self._call("GET", f"/v1/collections/{_part(collection)}/documents")
        return [_document(entry) for entry in _listed(body, "documents")]

    async def document(self, collection: str, document_id: str) -> Document:
        body = await self._call("GET", f"/v1/collections/{_part(collection)}/documents/{_part(document_id)}")
        return _document(body.get("document", body))

    async def delete_document(self, collection: str, document_id: str) -> None:
        await self._call("DELETE", f"/v1/collections/{_part(collection)}/documents/{_part(document_id)}")

    async def upload(self, collection: str, path: Path, filename: str) -> Job:
        """Hand a file over; the returned job tells how far it got."""
        with path.open("rb") as file:
            files = {"file": (filename, file, "application/octet-stream")}
            body = await self._call("POST", f"/v1/collections/{_part(collection)}/documents", files=files)
        return _job(body.get("job", body))

    async def job(self, job_id: str) -> Job:
        body = await self._call("GET", f"/v1/jobs/{_part(job_id)}")
        return _job(body.get("job", body))

    async def jobs(self, collection: str) -> list[Job]:
        body = await self._call("GET", f"/v1/collections/{_part(collection)}/jobs")
        return [_job(entry) for entry in _listed(body, "jobs")]

    # Conversations

    async def conversations(self) -> list[Conversation]:
        """The newest first, without their messages."""
        body = await self._call("GET", "/v1/conversations")
        return [_conversation(entry) for entry in _listed(body, "conversations")]

    async def create_conversation(self, title: str) -> Conversation:
        body = await self._call("POST", "/v1/conversations", json={"title": title})
        return _conversation(body.get("conversation", body))

    async def conversation(self, conversation_id: str) -> Conversation:
        body = await self._call("GET", f"/v1/conversations/{_part(conversation_id)}")
        return _conversation(body.get("conversation", body))

    async def rename_conversation(self, conversation_id: str, title: str) -> None:
        await self._call("PATCH", f"/v1/conversations/{_part(conversation_id)}", json={"title": title})

    async def delete_conversation(self, conversation_id: str) -> None:
        await self._call("DELETE", f"/v1/conversations/{_part(conversation_id)}")

    async def delete_from(self, conversation_id: str, message_id: str) -> None:
        """Delete a message and all after it."""
        await self._call("DELETE", f"/v1/conversations/{_part(conversation_id)}/messages/{_part(message_id)}")

    # Chat

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        collections: Sequence[str] = (),
        tools: Sequence[str] = (),
        conversation_id: str | None = None,
    ) -> AsyncGenerator[ChatEvent]:
        """Stream an answer. The last event is `Finished`; a stream that ends without it raises `ApiError`."""
        request: Json = {
            "model": model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
        }
        if collections:
            # What documents say is to be repeated, not varied: the likeliest words, the same at each try.
            request |= {"knowledge": {"collections": list(collections)}, "temperature": 0}
        if tools:
            request["windfarm_tools"] = list(tools)
        if conversation_id:
            request["conversation"] = conversation_id
        with _ReadableErrors():
            async with self._http.stream(
                "POST", "/v1/chat/completions", json=request, headers=self._headers
            ) as response:
                await _raise_for_error(response)
                async for event in _chat_events(response):
                    yield event

    async def _call(self, method: str, path: str, **arguments: Any) -> Json:
        with _ReadableErrors():
            response = await self._http.request(method, path, headers=self._headers, **arguments)
            await _raise_for_error(response)
            if response.status_code == HTTPStatus.NO_CONTENT or not response.content:
                return {}
            try:
                body = response.json()
            except ValueError as error:
                raise ApiError("windfarm sent an answer that this page cannot read. Reload the page.") from error
        return body if isinstance(body, dict) else {"data": body}


def open_http(api_url: str) -> httpx.AsyncClient:
    """Connections to one windfarm. Proxies from the environment are ignored: the address is on this machine."""
    return httpx.AsyncClient(base_url=api_url, timeout=_TIMEOUT, limits=_LIMITS, trust_env=False)


class _ReadableErrors:
    """Turns what httpx raises into sentences for people."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise ApiError(
                "windfarm cannot be reached; it may be restarting. Try again in a few seconds.", code="unreachable"
            ) from error
        if isinstance(error, httpx.TimeoutException):
            raise ApiError("windfarm did not answer in time. Try again.", code="timeout") from error
        if isinstance(error, httpx.TransportError):
            raise ApiError(
                "The connection to windfarm broke before the answer was complete. Try again.", code="cut"
            ) from error


async def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    await response.aread()
    try:
        detail = response.json()["error"]
        message, code = str(detail["message"]), str(detail.get("code") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = _plain_reason(response), ""
    if response.status_code == HTTPStatus.UNAUTHORIZED:
        message = "This key is not valid. Type “windfarm key” on the machine that runs windfarm to see yours."
    raise ApiError(message, code=code, status=response.status_code)


def _plain_reason(response: httpx.Response) -> str:
    if response.status_code in (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT):
        return "windfarm is starting or restarting. Try again in a few seconds."
    if response.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return "This file is too large for this windfarm."
    return f"windfarm refused the request (HTTP {response.status_code})."


# The stream


async def _chat_events(response: httpx.Response) -> AsyncGenerator[ChatEvent]:
    reason: str | None = None
    usage: Json = {}
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue  # blank lines between events, and comments that keep the connection open
        data = line[5:].strip()
        if data == "[DONE]":
            yield Finished(reason, usage)
            return
        chunk = _parsed(data)
        if error := chunk.get("error"):
            raise _stream_error(error)
        usage = chunk.get("usage") or usage
        if extension := chunk.get("windfarm"):
            for event in _windfarm_events(extension):
                yield event
        for choice in chunk.get("choices") or ():
            reason = choice.get("finish_reason") or reason
            if text := (choice.get("delta") or {}).get("content"):
                yield TextAdded(text)
    raise ApiError("The answer was cut off: the server closed the connection too early. Try again.", code="cut")


def _parsed(data: str) -> Json:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise ApiError("The answer was damaged on its way. Try again.", code="cut") from error
    return chunk if isinstance(chunk, dict) else {}


def _stream_error(error: object) -> ApiError:
    if isinstance(error, dict):
        return ApiError(str(error.get("message") or "The answer failed."), code=str(error.get("code") or ""))
    return ApiError(str(error))


def _windfarm_events(extension: Json) -> list[ChatEvent]:
    match extension.get("event"):
        case "retrieval":
            passages = extension.get("passages")
            found = len(passages) if isinstance(passages, list) else int(extension.get("num_passages") or 0)
            return [Retrieved(found)]
        case "tool_call":
            name, arguments = _call_of(extension)
            return [ToolCalled(str(extension.get("id") or ""), name, arguments)]
        case "tool_result":
            name, _ = _call_of(extension)
            return [ToolAnswered(str(extension.get("id") or ""), name, _result_of(extension), _failed(extension))]
        case "citations":
            citations = tuple(_citation(entry) for entry in extension.get("citations") or ())
            return [Cited(citations, extension.get("answer"), extension.get("evidence"))]
        case "context":
            return [ContextTrimmed(_trimmed(extension))]
        case "error":
            raise _stream_error(extension.get("error") or extension)
    return []  # an event of a newer server: what the page does not know, it does not show


# From JSON to records. Fields that are missing become empty: an older or newer server must not break the page.


def _listed(body: Json, name: str) -> list[Json]:
    entries: list[Any] = body.get("data") or body.get(name) or []
    return [entry for entry in entries if isinstance(entry, dict)]


def _part(value: str) -> str:
    """A value as one part of a path: names may hold blanks and slashes."""
    return quote(value, safe="")


def _collection(entry: Json) -> Collection:
    return Collection(
        name=str(entry["name"]),
        description=str(entry.get("description") or ""),
        num_documents=_count(entry, "num_documents"),
    )


def _document(entry: Json) -> Document:
    return Document(
        id=str(entry.get("id") or entry.get("document_id") or ""),
        name=str(entry.get("name") or entry.get("filename") or "document"),
        num_chunks=_count(entry, "num_chunks"),
        text=str(entry.get("text") or ""),
    )


def _job(entry: Json) -> Job:
    error = entry.get("error")
    return Job(
        id=str(entry["id"]),
        filename=str(entry.get("filename") or ""),
        state=str(entry["state"]),
        progress=float(entry.get("progress") or 0.0),
        num_chunks=_count(entry, "num_chunks"),
        is_unchanged=bool(entry.get("unchanged")),
        error=str(error.get("message") or error.get("code")) if isinstance(error, dict) else None,
        warnings=tuple(str(warning) for warning in entry.get("warnings") or ()),
    )


def _conversation(entry: Json) -> Conversation:
    return Conversation(
        id=str(entry["id"]),
        title=str(entry.get("title") or "Untitled"),
        model=entry.get("model"),
        collections=tuple(str(name) for name in entry.get("collections") or ()),
        messages=tuple(_message(message) for message in entry.get("messages") or ()),
    )


def _message(entry: Json) -> Message:
    steps = [step for step in entry.get("steps") or () if isinstance(step, dict)]
    trimmed = [_trimmed(step) for step in steps if step.get("event") == "context"]
    evidence = [step.get("evidence") for step in steps if step.get("evidence")]
    return Message(
        role=str(entry.get("role") or "assistant"),
        content=str(entry.get("content") or ""),
        id=str(entry.get("id") or ""),
        citations=tuple(_citation(citation) for citation in entry.get("citations") or ()),
        steps=_tool_steps(steps),
        trimmed=trimmed[-1] if trimmed else None,
        evidence=entry.get("evidence") or (evidence[-1] if evidence else None),
        state=str(entry.get("state") or "complete"),
    )


def _tool_steps(steps: list[Json]) -> tuple[ToolStep, ...]:
    """Pairs the calls with their results, in the order of the calls."""
    results = {str(step.get("id") or ""): step for step in steps if step.get("event") == "tool_result"}
    paired = []
    for step in steps:
        if step.get("event") != "tool_call":
            continue
        name, arguments = _call_of(step)
        result = results.get(str(step.get("id") or ""))
        if result is None:
            paired.append(ToolStep(name, arguments))
        else:
            paired.append(ToolStep(name, arguments, _result_of(result), _failed(result)))
    return tuple(paired)


def _citation(entry: Json) -> Citation:
    page, score = entry.get("page"), entry.get("score")
    return Citation(
        number=int(entry["number"]),
        document_id=str(entry.get("document_id") or ""),
        document=str(entry.get("document") or "document"),
        collection=str(entry.get("collection") or ""),
        page=int(page) if page is not None else None,
        start=int(entry.get("start") or 0),
        end=int(entry.get("end") or 0),
        text=str(entry.get("text") or ""),
        score=float(score) if score is not None else None,
    )


def _call_of(event: Json) -> tuple[str, str]:
    arguments = event.get("arguments")
    readable = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return str(event.get("name") or "tool"), readable


def _result_of(event: Json) -> str:
    result = event.get("content", event.get("result", event.get("error", "")))
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, indent=2)


def _failed(event: Json) -> bool:
    return bool(event.get("is_error") or event.get("error"))


def _trimmed(event: Json) -> Trimmed:
    omitted = event.get("omitted") or {}
    return Trimmed(
        num_messages=int(omitted.get("messages") or 0),
        num_passages=int(omitted.get("passages") or 0),
        reason=str(event.get("reason") or ""),
    )


def _count(entry: Json, name: str) -> int | None:
    return int(entry[name]) if entry.get(name) is not None else None
