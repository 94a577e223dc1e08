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

from ui import api_json
from ui.records import (
    Account,
    ChatEvent,
    Citation,
    Collection,
    Conversation,
    Document,
    DocumentView,
    Finished,
    Job,
    Message,
    TextAdded,
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
        return [api_json.collection(entry) for entry in api_json.listed(body, "collections")]

    async def create_collection(self, name: str) -> Collection:
        body = await self._call("POST", "/v1/collections", json={"name": name})
        return api_json.collection(body.get("collection", body))

    async def delete_collection(self, name: str) -> None:
        await self._call("DELETE", f"/v1/collections/{_part(name)}")

    async def documents(self, collection: str) -> list[Document]:
        body = await self._call("GET", f"/v1/collections/{_part(collection)}/documents")
        return [api_json.document(entry) for entry in api_json.listed(body, "documents")]

    async def document(self, collection: str, document_id: str) -> Document:
        body = await self._call("GET", f"/v1/collections/{_part(collection)}/documents/{_part(document_id)}")
        return api_json.document(body.get("document", body))

    async def view(self, citation: Citation) -> DocumentView:
        """The document where it is cited, with its page as a picture where it has drawn pages."""
        path = f"/v1/collections/{_part(citation.collection)}/documents/{_part(citation.document_id)}/view"
        span = {"start": citation.start, "end": citation.end, "image": "true"}
        version = {"version_id": citation.version_id} if citation.version_id else {}
        return api_json.document_view(await self._call("GET", path, params=span | version))

    async def delete_document(self, collection: str, document_id: str) -> None:
        await self._call("DELETE", f"/v1/collections/{_part(collection)}/documents/{_part(document_id)}")

    async def upload(self, collection: str, path: Path, filename: str) -> Job:
        """Hand a file over; the returned job tells how far it got."""
        with path.open("rb") as file:
            files = {"file": (filename, file, "application/octet-stream")}
            body = await self._call("POST", f"/v1/collections/{_part(collection)}/documents", files=files)
        return api_json.job(body.get("job", body))

    async def job(self, job_id: str) -> Job:
        body = await self._call("GET", f"/v1/jobs/{_part(job_id)}")
        return api_json.job(body.get("job", body))

    async def jobs(self, collection: str) -> list[Job]:
        body = await self._call("GET", f"/v1/collections/{_part(collection)}/jobs")
        return [api_json.job(entry) for entry in api_json.listed(body, "jobs")]

    async def give_feedback(self, conversation_id: str, message_id: str, rating: str, reason: str) -> None:
        """Rate an answer `up` or `down`; a second time takes the first one's place."""
        body = {"conversation": conversation_id, "message": message_id, "rating": rating, "reason": reason}
        await self._call("POST", "/v1/feedback", json=body)

    # Conversations

    async def conversations(self) -> list[Conversation]:
        """The newest first, without their messages."""
        body = await self._call("GET", "/v1/conversations")
        return [api_json.conversation(entry) for entry in api_json.listed(body, "conversations")]

    async def create_conversation(self, title: str) -> Conversation:
        body = await self._call("POST", "/v1/conversations", json={"title": title})
        return api_json.conversation(body.get("conversation", body))

    async def conversation(self, conversation_id: str) -> Conversation:
        body = await self._call("GET", f"/v1/conversations/{_part(conversation_id)}")
        return api_json.conversation(body.get("conversation", body))

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
            request |= {"knowledge": {"collections": list(collections)}}
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
            if extension.get("event") == "error":
                raise _stream_error(extension.get("error") or extension)
            for event in api_json.windfarm_events(extension):
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


def _part(value: str) -> str:
    """A value as one part of a path: names may hold blanks and slashes."""
    return quote(value, safe="")
