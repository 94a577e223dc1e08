"""Turns the events of a chat into OpenAI's JSON, streamed or whole, with windfarm's own events beside it.

Pure: events in, dictionaries out. `AnswerRecord` gathers what is stored of an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.engine import GenerationChunk, Usage
from rag.types import Passage
from services.chat_types import (
    ChatEvent,
    CitationsReady,
    CitedPassage,
    ContextTrimmed,
    Finished,
    RetrievalDone,
    TextDelta,
    ToolCall,
    ToolResult,
)
from services.openai_api import usage_json
from services.openai_stream import chat_logprobs

Json = dict[str, Any]


@dataclass(slots=True)
class AnswerRecord:
    """Everything that was said so far; what a conversation keeps, also of a stopped answer."""

    text: str = ""
    citations: list[Json] = field(default_factory=list)
    steps: list[Json] = field(default_factory=list)
    tool_calls: list[Json] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    evidence: str | None = None
    unsupported: list[list[int]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    document_ids: set[str] = field(default_factory=set)
    """The documents whose text the answer could use, cited or not."""

    def add(self, event: ChatEvent) -> None:
        self.document_ids.update(_documents_of(event))
        match event:
            case TextDelta(text=text, chunk=chunk):
                self.text += text
                self.logprobs += _logprobs(chunk)
            case ToolCall(side="client"):
                self.tool_calls.append(_openai_tool_call(event))
            case CitationsReady():
                self.citations = [citation_json(cited) for cited in event.citations]
                self.evidence = event.evidence
                self.unsupported = _spans(event.unsupported)
                self.text = event.answer if event.answer is not None else self.text
            case Finished():
                self.text, self.usage, self.finish_reason = event.text, event.usage, event.finish_reason
            case _:
                self.steps.append(windfarm_event(event))

    def withdraw(self) -> None:
        """Forget what was said: its documents are gone."""
        self.text, self.citations, self.steps, self.tool_calls, self.logprobs = "", [], [], [], []


def _documents_of(event: ChatEvent) -> Iterator[str]:
    match event:
        case RetrievalDone():
            yield from (passage.chunk.document_id for passage in event.passages)
        case ToolResult():
            yield from event.document_ids
        case CitationsReady():
            yield from (cited.citation.document_id for cited in event.citations)


class ChunkRenderer:
    """The chunks of one streamed chat, as `data:` events."""

    def __init__(self, answer_id: str, model: str, created: int, include_usage: bool) -> None:
        self._head = {"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._include_usage = include_usage
        self._is_first = True

    def render(self, event: ChatEvent) -> bytes:
        return b"".join(sse(chunk) for chunk in self._chunks(event))

    def _chunks(self, event: ChatEvent) -> Iterator[Json]:
        if self._is_first:
            self._is_first = False
            yield self._chunk({"role": "assistant", "content": ""})
        match event:
            case TextDelta(text=text, chunk=chunk):
                yield self._chunk({"content": text}, logprobs=_logprobs(chunk))
            case ToolCall(side="client"):
                yield self._chunk({"tool_calls": [{"index": event.index, **_openai_tool_call(event)}]})
            case Finished():
                yield self._chunk({}, finish_reason=event.finish_reason)
                if self._include_usage:
                    yield self._head | {"choices": [], "usage": usage_json(event.usage)}
            case _:
                yield self._chunk({}) | {"windfarm": windfarm_event(event)}

    def _chunk(self, delta: Json, finish_reason: str | None = None, logprobs: list[Json] | None = None) -> Json:
        choice: Json = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        if logprobs:
            choice["logprobs"] = {"content": logprobs, "refusal": None}
        chunk = self._head | {"choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk


def whole_answer(answer_id: str, model: str, created: int, record: AnswerRecord) -> Json:
    """The answer of a chat request that did not ask for a stream."""
    assert record.usage is not None, "the chat ended without its last event"
    message: Json = {"role": "assistant", "content": record.text, "refusal": None}
    if record.tool_calls:
        message |= {"tool_calls": record.tool_calls, "content": record.text or None}
    logprobs = {"content": record.logprobs, "refusal": None} if record.logprobs else None
    answer: Json = {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": record.finish_reason}],
        "usage": usage_json(record.usage),
    }
    if record.steps or record.evidence is not None:
        answer["windfarm"] = _extension(record)
    return answer


def _extension(record: AnswerRecord) -> Json:
    extension: Json = {"steps": record.steps}
    if record.evidence is not None:
        extension |= {
            "citations": record.citations,
            "evidence": record.evidence,
            "unsupported": record.unsupported,
        }
    trimmed = [step for step in record.steps if step["event"] == "context"]
    if trimmed:
        extension["context"] = trimmed[-1]
    return extension


def windfarm_event(event: ChatEvent) -> Json:
    match event:
        case RetrievalDone():
            found = [_passage_json(passage) for passage in event.passages]
            return {
                "event": "retrieval",
                "query": event.query,
                "rewritten": event.is_rewritten,
                "evidence": event.evidence,
                "passages": found,
            }
        case ContextTrimmed():
            omitted = {"messages": event.num_messages, "passages": event.num_passages}
            return {"event": "context", "omitted": omitted, "reason": event.reason}
        case ToolCall():
            return {"event": "tool_call", "id": event.call_id, "name": event.name, "arguments": event.arguments}
        case ToolResult():
            return {
                "event": "tool_result",
                "id": event.call_id,
                "name": event.name,
                "content": event.content,
                "is_error": event.is_error,
            }
        case CitationsReady():
            return {
                "event": "citations",
                "citations": [citation_json(cited) for cited in event.citations],
                "answer": event.answer,
                "evidence": event.evidence,
                "unsupported": _spans(event.unsupported),
            }
    raise AssertionError(f"{type(event).__name__} is part of OpenAI's own format")


def citation_json(cited: CitedPassage) -> Json:
    citation = cited.citation
    return {
        "number": citation.number,
        "document_id": citation.document_id,
        "version_id": citation.version_id,
        "document": citation.document_name,
        "collection": citation.collection,
        "page": citation.page,
        "start": citation.start,
        "end": citation.end,
        "text": citation.quote,
        "score": round(float(citation.score), 6),
        "answer_spans": [list(span) for span in cited.answer_spans],
    }


def _spans(places: Sequence[tuple[int, int]]) -> list[list[int]]:
    return [list(place) for place in places]


def _passage_json(passage: Passage) -> Json:
    """Where a passage stands and how well it fits; its text comes with the citation, if it is cited."""
    chunk = passage.chunk
    return {
        "document_id": chunk.document_id,
        "version_id": chunk.version_id,
        "document": chunk.document_name,
        "page": chunk.page,
        "start": chunk.start,
        "end": chunk.end,
        "score": round(float(passage.score), 6),
    }


def sse(value: Json) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _openai_tool_call(call: ToolCall) -> Json:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(chunk: GenerationChunk | None) -> list[Json]:
    return chat_logprobs(chunk.logprobs) if chunk is not None and chunk.logprobs is not None else []
