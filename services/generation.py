"""Chat and text completions: from a checked request to its answer, whole or as a stream.

A plain request (nothing to retrieve, to run or to keep) is relayed: the replica renders the events and its bytes go
through unparsed. Anything else is told by the chat story, whose events are rendered here and kept in the conversation.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from cluster.engine import GenerationChunk, GenerationRequest, TokenLogprob, Usage
from services.chat_rendering import AnswerRecord, ChunkRenderer, Json, whole_answer
from services.chat_types import (
    ChatEvent,
    ChatRequest,
    CitationsReady,
    KnowledgeOptions,
    ModelClient,
    SearchTurn,
    TextDelta,
    ToolResult,
)
from services.config import ChatConfig
from services.continuation import ContinuedStream
from services.conversations import Conversations, MessageState
from services.error_responses import error_event, is_expected, to_api_error
from services.errors import ApiError, conflict
from services.event_stream import DONE, ClientGone, EventStream, until_client_leaves
from services.frames import FrameKind
from services.metrics import Metrics
from services.model_queues import SEARCHES, ModelQueues, Place, Priority
from services.openai_api import ChatCompletionRequest, CompletionRequest, usage_json
from services.openai_stream import chat_logprobs, completion_logprobs
from services.relay import ModelPool, PooledModel, parse_chunk, wire_body
from services.routing import Answer, Call, json_answer
from services.token_estimate import estimate_chat, estimate_completion, estimate_search

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
Asked = ChatCompletionRequest | CompletionRequest
_CHECK_SOURCES_S = 0.5
"""How often an answer under way asks whether its documents are still there and still to be read."""

ChatStory = Callable[[ChatRequest, ModelClient], AsyncIterator[ChatEvent]]


class Generation:
    """Answers generation requests; one per endpoint process."""

    def __init__(
        self,
        config: ChatConfig,
        pool: ModelPool,
        queues: ModelQueues,
        story: ChatStory,
        conversations: Conversations,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._queues = queues
        self._pool = pool
        self._story = story
        self._conversations = conversations
        self._metrics = metrics

    def require(self, model: str) -> None:
        """An unknown or unready model is refused before anything is done; one that is about to come is waited for."""
        self._pool.require(model)

    async def chat(self, call: Call, request: ChatCompletionRequest) -> Answer | None:
        call.model = request.model
        answer = _ChatAnswer(call, request)
        if not request.is_plain:
            return await self._tell(answer)
        generation = GenerationRequest(call.request_id, messages=request.engine_messages(), sampling=request.sampling())
        if request.stream:
            render = {"kind": "chat", "first_role": True, **answer.head, "include_usage": request.includes_usage}
            return await self._relay(call, request, generation, render)
        chunks = await self._collect(call, request, generation)
        record = AnswerRecord(
            text="".join(chunk.text for chunk in chunks),
            logprobs=chat_logprobs(_all_logprobs(chunks)),
            finish_reason=chunks[-1].finish_reason,
            usage=chunks[-1].usage,
        )
        return json_answer(whole_answer(answer.id, request.model, answer.created, record))

    async def complete(self, call: Call, request: CompletionRequest) -> Answer | None:
        call.model = request.model
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "model": request.model, "created": int(time.time())}
        generation = GenerationRequest(call.request_id, sampling=request.sampling(), **request.prompt_field())
        if request.stream:
            render = {"kind": "completion", **head, "include_usage": request.includes_usage}
            return await self._relay(call, request, generation, render)
        chunks = await self._collect(call, request, generation)
        return json_answer(_whole_completion(head, chunks, request.logprobs))

    # The plain way: bytes through

    async def _relay(
        self, call: Call, asked: Asked, request: GenerationRequest, render: dict[str, Any]
    ) -> Answer | None:
        events, meter, model = self._event_stream(call), call.meter, asked.model

        async def forward(place: Place) -> None:
            upstream = await self._open(model, request, render)
            if meter is not None:
                meter.begin()
            try:
                async for frames in upstream.batches():
                    if place.first_token_at is None and any(frame.has_tokens for frame in frames):
                        place.note_token()
                    # One write for all that came together: each costs more than the bytes in it.
                    data = b"".join(frame.payload for frame in frames if frame.kind is FrameKind.DATA)
                    if meter is not None:
                        meter.add(sum(frame.num_token_ids for frame in frames))
                    if upstream.end is not None:
                        await self._book(call, Usage(**upstream.end["usage"]))
                        await events.end(data + DONE)
                    elif data:
                        await events.send(data)
            finally:
                place.note_answer(upstream.num_tokens)
                await upstream.close()
            assert upstream.end is not None
            self._metrics.tokens(model, Usage(**upstream.end["usage"]))
            self._note_first_token(call, model, place)

        await self._run(call, events, self._in_turn(call, asked, forward))
        return None

    async def _open(self, model: str, request: GenerationRequest, render: dict[str, Any]) -> ContinuedStream:
        """Start a generation. Our default for the answer's length gives way where the context leaves less."""
        if request.sampling.max_tokens is not None:
            return await self._pool.generate(model, wire_body(request, render))
        limited = replace(request.sampling, max_tokens=self._config.default_max_tokens)
        try:
            return await self._pool.generate(model, wire_body(replace(request, sampling=limited), render))
        except ApiError as error:
            if error.code != "context_length_exceeded" or error.param != "max_tokens":
                raise
        return await self._pool.generate(model, wire_body(request, render))

    async def _in_turn(self, call: Call, asked: Asked, work: Callable[[Place], Awaitable[Result]]) -> Result:
        """Do the work when it is this request's turn at its model."""
        if isinstance(asked, CompletionRequest):
            estimate = estimate_completion(asked)
        else:
            estimate = estimate_chat(asked, self._config.default_max_tokens, 0)
        key, num_tokens = call.actor.key_id, estimate.num_prompt_tokens
        async with self._queues.place(asked.model, key, _priority(asked), num_tokens) as place:
            await self._pool.until_there(asked.model)
            return await work(place)

    async def _collect(self, call: Call, asked: Asked, request: GenerationRequest) -> list[GenerationChunk]:
        """All chunks of an answer; the last one has its finish reason and usage."""
        model = asked.model

        async def read(place: Place) -> list[GenerationChunk]:
            upstream, meter = await self._open(model, request, {"kind": "events"}), call.meter
            if meter is not None:
                meter.begin()
            chunks = []
            try:
                async for frame in upstream:
                    if frame.kind is FrameKind.DATA:
                        if frame.has_tokens:
                            place.note_token()
                        chunks.append(parse_chunk(frame))
                        if meter is not None:
                            meter.add(frame.num_token_ids)
            finally:
                place.note_answer(upstream.num_tokens)
                await upstream.close()
            assert upstream.end is not None
            usage = Usage(**upstream.end["usage"])
            if meter is not None:
                meter.finish(usage)
            self._metrics.tokens(model, usage)
            return [*chunks, GenerationChunk(finish_reason=upstream.end["finish_reason"], usage=usage)]

        return await until_client_leaves(call.receive, self._in_turn(call, asked, read))

    # The way with a story: events, rendered and kept

    async def _tell(self, answer: _ChatAnswer) -> Answer | None:
        call, request = answer.call, answer.request
        if request.conversation is not None:
            await self._keep_question(call, request)
        if not request.stream:
            await until_client_leaves(
                call.receive, self._in_turn(call, request, partial(self._follow, answer, _ignore))
            )
            return json_answer(whole_answer(answer.id, request.model, answer.created, answer.record))
        events = self._event_stream(call)
        renderer = ChunkRenderer(answer.id, request.model, answer.created, request.includes_usage)

        async def show(event: ChatEvent) -> None:
            await events.send(renderer.render(event))

        async def tell() -> None:
            await self._in_turn(call, request, partial(self._follow, answer, show))
            if call.permit is not None:
                await call.permit.settle()
            await events.end(DONE)

        await self._run(call, events, tell())
        return None

    async def _follow(self, answer: _ChatAnswer, show: Callable[[ChatEvent], Awaitable[None]], place: Place) -> None:
        """Show every event of the story. The conversation keeps what was said, also of a stopped or failed answer."""
        state: MessageState = "failed"
        try:
            request = answer.story_request(self._search_turn(answer))
            async with aclosing(self._story(request, self._model(answer))) as story:  # type: ignore[type-var]
                async for event in story:
                    if isinstance(event, TextDelta):
                        place.note_token()
                    answer.record.add(event)
                    await self._check_sources(answer, event)
                    await show(event)
            state = "complete"
        except asyncio.CancelledError:
            state = "stopped"
            raise
        finally:
            await self._keep_answer(answer, state)
        if answer.record.usage is not None:
            place.note_answer(answer.record.usage.num_completion_tokens)
            self._metrics.tokens(answer.request.model, answer.record.usage)
        if answer.request.stream:
            self._note_first_token(answer.call, answer.request.model, place)

    async def _check_sources(self, answer: _ChatAnswer, event: ChatEvent) -> None:
        """End an answer whose documents were deleted or taken from its reader while it is written: before anything of
        theirs is shown letter by letter, and every moment in between."""
        sources, now = answer.record.document_ids, time.monotonic()
        shows_text = isinstance(event, CitationsReady | ToolResult)
        if not sources or (not shows_text and now - answer.checked_at < _CHECK_SOURCES_S):
            return
        answer.checked_at = now
        if not await asyncio.to_thread(self._conversations.may_read, answer.call.actor, sources):
            answer.record.withdraw()
            raise conflict(
                "Documents of this answer were deleted, or taken from you, while it was written. Ask again.",
                code="documents_changed",
            )

    def _search_turn(self, answer: _ChatAnswer) -> SearchTurn:
        """Searches of an answer wait among all others. Its place at the model is held meanwhile; nobody who has a place
        at the search waits for one at a model."""
        key, priority = answer.call.actor.key_id, _priority(answer.request)
        return lambda query: self._queues.place(SEARCHES, key, priority, estimate_search([query]))

    def _model(self, answer: _ChatAnswer) -> ModelClient:
        return PooledModel(self._pool, answer.request.model, answer.call.meter)

    async def _keep_question(self, call: Call, request: ChatCompletionRequest) -> None:
        """Store the user's last message before the model is asked: a failure must not lose it."""
        last = request.messages[-1]
        assert request.conversation is not None
        if last.role != "user":
            await asyncio.to_thread(self._conversations.get, call.actor, request.conversation)  # 404 where unknown
            return
        content = last.to_engine()["content"]
        await asyncio.to_thread(self._conversations.add_message, call.actor, request.conversation, "user", content)
        chosen = {
            "model": request.model,
            "collections": list(request.knowledge.collections) if request.knowledge else [],
        }
        await asyncio.to_thread(self._conversations.update, call.actor, request.conversation, chosen)

    async def _keep_answer(self, answer: _ChatAnswer, state: MessageState) -> None:
        conversation = answer.request.conversation
        if conversation is None:
            return
        record = answer.record
        steps = list(record.steps)
        if record.evidence:
            steps.append({"event": "evidence", "evidence": record.evidence, "unsupported": record.unsupported})
        await asyncio.to_thread(
            self._conversations.add_message,
            answer.call.actor,
            conversation,
            "assistant",
            record.text,
            citations=record.citations,
            steps=steps,
            state=state,
            model=answer.request.model,
            document_ids=record.document_ids,
        )

    # Both ways

    def _event_stream(self, call: Call) -> EventStream:
        headers = {"x-request-id": call.request_id, **call.answer_headers}
        return EventStream(
            call.send, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        )

    async def _run(self, call: Call, events: EventStream, work: Awaitable[None]) -> None:
        """Send a stream to its end. A failure before its first byte is an ordinary error answer, later an event."""
        try:
            await until_client_leaves(call.receive, work, events.keep_alive(self._config.keep_alive_s))
        except ClientGone:
            raise
        except Exception as error:
            if not events.has_begun:
                raise
            if not is_expected(error):
                _log.exception("Request %s failed in the middle of its stream.", call.request_id)
            failure = to_api_error(error, call.request_id)
            call.status = failure.status
            if call.permit is not None:
                await call.permit.settle(has_failed=True)
            await events.end(error_event(failure))

    async def _book(self, call: Call, usage: Usage) -> None:
        """The end of a relayed stream, before its client sees it."""
        if call.permit is not None:
            call.permit.meter.finish(usage)
            await call.permit.settle()

    def _note_first_token(self, call: Call, model: str, place: Place) -> None:
        """Of a whole streamed answer."""
        if place.first_token_at is not None:
            self._metrics.first_token(model, place.first_token_at - call.started_at)


class _ChatAnswer:
    """One chat answer in the making."""

    def __init__(self, call: Call, request: ChatCompletionRequest) -> None:
        self.call = call
        self.request = request
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.record = AnswerRecord()
        self.checked_at = 0.0

    @property
    def head(self) -> dict[str, Any]:
        return {"id": self.id, "model": self.request.model, "created": self.created}

    def story_request(self, search_turn: SearchTurn) -> ChatRequest:
        request = self.request
        knowledge = request.knowledge
        return ChatRequest(
            request_id=self.call.request_id,
            model=request.model,
            messages=request.engine_messages(),
            sampling=request.sampling(),
            knowledge=None
            if knowledge is None
            else KnowledgeOptions(tuple(knowledge.collections), knowledge.top_k, knowledge.threshold),
            server_tools=tuple(request.windfarm_tools or ()),
            client_tools=tuple(tool.model_dump(exclude_none=True) for tool in request.tools or ()),
            tool_choice=request.tool_choice_name,
            actor=self.call.actor.user_id,
            search_turn=search_turn,
        )


def _priority(asked: Asked) -> Priority:
    return "flex" if isinstance(asked, ChatCompletionRequest) and asked.service_tier == "flex" else "default"


async def _ignore(_event: ChatEvent) -> None:
    """Nobody watches: the answer is sent whole."""


def _all_logprobs(chunks: Sequence[GenerationChunk]) -> tuple[TokenLogprob, ...]:
    return tuple(entry for chunk in chunks for entry in chunk.logprobs or ())


def _whole_completion(head: Json, chunks: Sequence[GenerationChunk], num_logprobs: int | None) -> Json:
    usage = chunks[-1].usage
    assert usage is not None
    choice = {
        "index": 0,
        "text": "".join(chunk.text for chunk in chunks),
        "logprobs": None if num_logprobs is None else completion_logprobs(_all_logprobs(chunks), 0),
        "finish_reason": chunks[-1].finish_reason,
    }
    return {**head, "object": "text_completion", "choices": [choice], "usage": usage_json(usage)}
