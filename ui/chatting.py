"""Asking, stopping and asking again: the generators that stream an answer into the chat.

The database holds the conversation; each event reads it anew, so tabs, restarts and reloads cannot disagree. Closing a
generator (the stop button, a closed tab) closes the stream, which ends the generation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from ui.api_client import ApiClient, ApiError
from ui.bubbles import Bubble, bubbles, error_bubble
from ui.notices import warn
from ui.panels import source_list, unsupported_list
from ui.records import (
    ChatEvent,
    Cited,
    ContextTrimmed,
    Conversation,
    Message,
    Retrieved,
    TextAdded,
    ToolAnswered,
    ToolCalled,
    ToolStep,
)

TOOLS = ("calculator", "datetime", "knowledge_search")
_TITLE_LENGTH = 60
# The browser redraws the answer at each update; more often than this costs it more than a reader sees.
_UPDATE_INTERVAL_S = 0.06
_STOP_CHECKS = 15
_STOP_CHECK_INTERVAL_S = 0.2

Connect = Callable[[str], ApiClient]
Outputs = tuple[Any, ...]
"""Values for: chat, question box, conversation id, sources."""


@dataclass(slots=True)
class Draft:
    """The answer that is being streamed."""

    message: Message = field(default_factory=lambda: Message("assistant", ""))
    doing: str | None = None

    def apply(self, event: ChatEvent) -> None:
        match event:
            case TextAdded(text):
                self.doing = None
                self.message = replace(self.message, content=self.message.content + text)
            case Retrieved(num_passages, query):
                self.message = replace(self.message, query=query)
                found = f"{num_passages} passage{'' if num_passages == 1 else 's'}"
                self.doing = f"Reading {found}" if num_passages else None
            case ToolCalled(_, name, arguments):
                self.doing = None
                self.message = replace(self.message, steps=(*self.message.steps, ToolStep(name, arguments)))
            case ToolAnswered(_, name, result, is_error):
                self.message = replace(self.message, steps=_answered(self.message.steps, name, result, is_error))
            case ContextTrimmed(trimmed):
                self.message = replace(self.message, trimmed=trimmed)
            case Cited(citations, answer, evidence, unsupported):
                content = self.message.content if answer is None else answer
                self.message = replace(
                    self.message, content=content, citations=citations, evidence=evidence, unsupported=unsupported
                )

    def bubbles(self) -> list[Bubble]:
        return bubbles([self.message], doing=self.doing)


def make_ask(connect: Connect) -> Callable[..., AsyncGenerator[Outputs]]:
    async def ask(
        key: str, conversation_id: str, question: str, model: str, collections: list[str], has_tools: bool
    ) -> AsyncGenerator[Outputs]:
        """Put a question and stream its answer."""
        if not question.strip():
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        answering = _answer(connect(key), conversation_id, question.strip(), model, collections or [], has_tools)
        async with aclosing(answering):
            async for outputs in answering:
                yield outputs

    return ask


def make_retry(connect: Connect) -> Callable[..., AsyncGenerator[Outputs]]:
    async def retry(
        key: str, conversation_id: str, model: str, collections: list[str], has_tools: bool
    ) -> AsyncGenerator[Outputs]:
        """Take the last question and its answer out of the conversation and ask it again."""
        client = connect(key)
        try:
            messages = (await client.conversation(conversation_id)).messages
            last = next((message for message in reversed(messages) if message.role == "user"), None)
            if last is None:
                raise ApiError("There is no question to ask again in this conversation.")
            await client.delete_from(conversation_id, last.id)
        except ApiError as error:
            warn(error.message)
            yield gr.skip(), idle_box(), gr.skip(), gr.skip()
            return
        answering = _answer(client, conversation_id, last.content, model, collections or [], has_tools)
        async with aclosing(answering):
            async for outputs in answering:
                yield outputs

    return retry


def make_show_stopped(connect: Connect) -> Callable[..., Awaitable[Outputs]]:
    async def show_stopped(key: str, conversation_id: str, shown: list[Bubble]) -> Outputs:
        """After a stop: what the server kept of the answer, which it writes down once it notices the closed stream."""
        if not conversation_id:
            return _marked_stopped(shown), idle_box(), gr.skip(), gr.skip()
        client = connect(key)
        try:
            for _ in range(_STOP_CHECKS):
                conversation = await client.conversation(conversation_id)
                if conversation.messages and conversation.messages[-1].role == "assistant":
                    sources = newest_sources(conversation)
                    return bubbles(conversation.messages), idle_box(), gr.skip(), sources
                await asyncio.sleep(_STOP_CHECK_INTERVAL_S)
        except ApiError as error:
            warn(error.message)
        return _marked_stopped(shown), idle_box(), gr.skip(), gr.skip()

    return show_stopped


def _marked_stopped(shown: list[Bubble]) -> list[Bubble]:
    finished = [bubble for bubble in shown if (bubble.get("metadata") or {}).get("status") != "pending"]
    return [*finished, *bubbles([Message("assistant", "", state="stopped")])]


def idle_box() -> Any:
    return gr.Textbox(submit_btn=True, stop_btn=False)


def busy_box() -> Any:
    return gr.Textbox(value="", submit_btn=False, stop_btn=True)


def title_of(question: str) -> str:
    flat = " ".join(question.split())
    return flat if len(flat) <= _TITLE_LENGTH else f"{flat[:_TITLE_LENGTH].rstrip()}…"


async def _answer(
    client: ApiClient, conversation_id: str, question: str, model: str, collections: list[str], has_tools: bool
) -> AsyncGenerator[Outputs]:
    asked = Message("user", question)
    history: tuple[Message, ...] = ()
    draft = Draft(doing="Searching your documents" if collections else None)
    yield [*bubbles([asked])], busy_box(), conversation_id, source_list((), "")
    try:
        conversation = await _open(client, conversation_id, question)
        conversation_id, history = conversation.id, conversation.messages
        before = bubbles([*history, asked])
        yield [*before, *draft.bubbles()], gr.skip(), conversation_id, gr.skip()
        stream = client.chat(
            [*_told(history), asked],
            model=model,
            collections=collections,
            tools=TOOLS if has_tools else (),
            conversation_id=conversation_id,
        )
        async with aclosing(_paced(stream, draft)) as updates:
            async for _ in updates:
                yield [*before, *draft.bubbles()], gr.skip(), gr.skip(), gr.skip()
        conversation = await client.conversation(conversation_id)
    except ApiError as error:
        shown = [*bubbles([*history, asked]), *bubbles([draft.message]), error_bubble(error.message)]
        box = idle_box() if await _is_kept(client, conversation_id, question) else _returned_box(question)
        yield shown, box, conversation_id, gr.skip()
        return
    yield bubbles(conversation.messages), idle_box(), conversation_id, newest_sources(conversation)


def newest_sources(conversation: Conversation) -> str:
    """The sources of the last answer."""
    last = next((message for message in reversed(conversation.messages) if message.role == "assistant"), None)
    return answer_sources(last) if last else source_list((), "")


def answer_sources(message: Message, opened: int | None = None, view: str = "") -> str:
    """The sources of an answer, one of them opened, and what of the answer has none."""
    said = [message.content[start:end] for start, end in message.unsupported]
    return source_list(message.citations, message.id, opened, view) + unsupported_list(said)


async def _open(client: ApiClient, conversation_id: str, question: str) -> Conversation:
    if conversation_id:
        return await client.conversation(conversation_id)
    return await client.create_conversation(title_of(question))


async def _paced(stream: AsyncGenerator[ChatEvent], draft: Draft) -> AsyncGenerator[None]:
    """Apply all events to the draft; yield where the page should be redrawn."""
    shown_at = 0.0
    async with aclosing(stream) as events:
        async for event in events:
            draft.apply(event)
            now = time.monotonic()
            if not isinstance(event, TextAdded) or now - shown_at >= _UPDATE_INTERVAL_S:
                shown_at = now
                yield
                await asyncio.sleep(0)


def _told(history: tuple[Message, ...]) -> list[Message]:
    """What the model is told of earlier turns: questions that got an answer, and these answers.

    Some models' templates refuse two questions in a row, so one that failed is left out.
    """
    told: list[Message] = []
    for message in history:
        if told and told[-1].role == message.role == "user":
            told.pop()
        if message.content and message.role in ("user", "assistant"):
            told.append(message)
    if told and told[-1].role == "user":
        told.pop()
    return told


async def _is_kept(client: ApiClient, conversation_id: str, question: str) -> bool:
    """Whether the conversation holds this question as its last one, so that the retry button can ask it again."""
    if not conversation_id:
        return False
    try:
        messages = (await client.conversation(conversation_id)).messages
    except ApiError:
        return False  # nothing is known; the question goes back into its box
    last = next((message for message in reversed(messages) if message.role == "user"), None)
    return last is not None and last.content == question


def _answered(steps: tuple[ToolStep, ...], name: str, result: str, is_error: bool) -> tuple[ToolStep, ...]:
    """The steps with the first open call of this tool closed."""
    for index, step in enumerate(steps):
        if step.name == name and step.result is None:
            return (*steps[:index], replace(step, result=result, is_error=is_error), *steps[index + 1 :])
    return steps


def _returned_box(question: str) -> Any:
    """A question that the server did not take comes back, so that it need not be typed again."""
    return gr.Textbox(value=question, submit_btn=True, stop_btn=False)
