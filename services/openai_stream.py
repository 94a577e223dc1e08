"""Renders an engine's stream as the bytes of OpenAI's server-sent events. Pure.

This runs once per token, so the parts that do not change are put together once. The endpoint forwards these bytes
unparsed and adds `[DONE]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from cluster.engine import GenerationChunk, TokenLogprob
from services.model_wire import RenderOptions
from services.openai_api import usage_json


class StreamRenderer(Protocol):
    """One stream. Each method returns bytes to send; they may be empty."""

    def begin(self) -> bytes: ...

    def chunk(self, chunk: GenerationChunk) -> bytes: ...


def make_renderer(options: RenderOptions) -> StreamRenderer:
    match options.kind:
        case "chat":
            return ChatRenderer(options)
        case "completion":
            return CompletionRenderer(options)
        case "events":
            return EventRenderer()


class _SseRenderer:
    """What chat and text completions have in common: one head for all chunks of a stream."""

    object_name: str

    def __init__(self, options: RenderOptions) -> None:
        self._options = options
        head = {"id": options.id, "object": self.object_name, "created": options.created, "model": options.model}
        self._head = b"data: " + _dump(head)[:-1] + b',"choices":'

    def _event(self, choices: bytes) -> bytes:
        return self._head + choices + b"}\n\n"

    def _usage_event(self, chunk: GenerationChunk) -> bytes:
        if not self._options.include_usage or chunk.usage is None:
            return b""
        return self._head + b'[],"usage":' + _dump(usage_json(chunk.usage)) + b"}\n\n"


class ChatRenderer(_SseRenderer):
    object_name = "chat.completion.chunk"

    def begin(self) -> bytes:
        if not self._options.first_role:
            return b""
        return self._event(
            b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        )

    def chunk(self, chunk: GenerationChunk) -> bytes:
        events = b""
        if chunk.text or chunk.logprobs:
            logprobs = b"null" if chunk.logprobs is None else _dump({"content": chat_logprobs(chunk.logprobs)})
            events = self._event(
                b'[{"index":0,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}]'
                % (_dump(chunk.text), logprobs)
            )
        if chunk.finish_reason is not None:
            events += self._event(
                b'[{"index":0,"delta":{},"logprobs":null,"finish_reason":%b}]' % _dump(chunk.finish_reason)
            )
            events += self._usage_event(chunk)
        return events


class CompletionRenderer(_SseRenderer):
    object_name = "text_completion"

    def __init__(self, options: RenderOptions) -> None:
        super().__init__(options)
        self._num_characters = options.num_characters

    def begin(self) -> bytes:
        return b""

    def chunk(self, chunk: GenerationChunk) -> bytes:
        events = b""
        if chunk.text or chunk.logprobs:
            logprobs = b"null"
            if chunk.logprobs is not None:
                logprobs = _dump(completion_logprobs(chunk.logprobs, self._num_characters))
            events = self._event(
                b'[{"index":0,"text":%b,"logprobs":%b,"finish_reason":null}]' % (_dump(chunk.text), logprobs)
            )
            self._num_characters += len(chunk.text)
        if chunk.finish_reason is not None:
            events += self._event(
                b'[{"index":0,"text":"","logprobs":null,"finish_reason":%b}]' % _dump(chunk.finish_reason)
            )
            events += self._usage_event(chunk)
        return events


class EventRenderer:
    """For the chat story, which looks at the text itself: the chunk as JSON, token ids beside it in the frame."""

    def begin(self) -> bytes:
        return b""

    def chunk(self, chunk: GenerationChunk) -> bytes:
        event: dict[str, Any] = {"text": chunk.text}
        if chunk.logprobs is not None:
            event["logprobs"] = [
                {"token_id": entry.token_id, "token": entry.token, "logprob": entry.logprob, "top": entry.top}
                for entry in chunk.logprobs
            ]
        if chunk.finish_reason is not None:
            event["finish_reason"] = chunk.finish_reason
        return _dump(event)


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        _token(entry.token, entry.logprob) | {"top_logprobs": [_token(token, value) for token, value in entry.top]}
        for entry in logprobs
    ]


def completion_logprobs(logprobs: Sequence[TokenLogprob], text_offset: int) -> dict[str, Any]:
    """The older shape: parallel lists. `text_offset` is where the first token begins in the answer."""
    offsets = []
    for entry in logprobs:
        offsets.append(text_offset)
        text_offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [dict(entry.top) for entry in logprobs] if any(entry.top for entry in logprobs) else None,
        "text_offset": offsets,
    }


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
