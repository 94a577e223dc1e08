"""Signing in with a key, coming back after a reload, signing out.

The key stays in the browser (local storage of this address) and comes with every event; this process keeps none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ui.api_client import ApiClient, ApiError
from ui.chatting import Connect
from ui.conversations import choices_of, fresh, opened
from ui.documents import documents_or_nothing
from ui.panels import account, conversation_list, notice
from ui.records import Conversation

_RETRY_INTERVAL_S = 2.0
_MAX_RETRIES = 60


@dataclass(frozen=True, slots=True)
class View:
    """Everything that changes when somebody comes in or leaves, in the order of the outputs."""

    key: Any = field(default_factory=gr.skip)
    splash: Any = field(default_factory=gr.skip)
    sign_in: Any = field(default_factory=gr.skip)
    shell: Any = field(default_factory=gr.skip)
    key_box: Any = field(default_factory=gr.skip)
    sign_in_notice: Any = field(default_factory=gr.skip)
    account: Any = field(default_factory=gr.skip)
    model: Any = field(default_factory=gr.skip)
    collections: Any = field(default_factory=gr.skip)
    target: Any = field(default_factory=gr.skip)
    documents: Any = field(default_factory=gr.skip)
    conversations: Any = field(default_factory=gr.skip)
    chat: Any = field(default_factory=gr.skip)
    question: Any = field(default_factory=gr.skip)
    conversation_id: Any = field(default_factory=gr.skip)
    sources: Any = field(default_factory=gr.skip)

    def outputs(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)


Enter = Callable[..., AsyncGenerator[tuple[Any, ...]]]


def make_sign_in(connect: Connect) -> Enter:
    async def sign_in(typed_key: str, wanted_id: str) -> AsyncGenerator[tuple[Any, ...]]:
        key = typed_key.strip()
        if not key:
            yield signed_out("Enter your key.").outputs()
            return
        try:
            yield (await _signed_in(connect(key), key, wanted_id)).outputs()
        except ApiError as error:
            yield View(sign_in_notice=notice(error.message)).outputs()

    return sign_in


def make_come_back(connect: Connect) -> Enter:
    async def come_back(key: str, wanted_id: str) -> AsyncGenerator[tuple[Any, ...]]:
        """The page was opened: with a kept key go on where it was left, waiting for a server that restarts."""
        if not key:
            yield signed_out().outputs()
            return
        for _ in range(_MAX_RETRIES):
            try:
                yield (await _signed_in(connect(key), key, wanted_id)).outputs()
                return
            except ApiError as error:
                if error.is_wrong_key:
                    yield signed_out(error.message).outputs()
                    return
                yield View(splash=splash(error.message)).outputs()
            await asyncio.sleep(_RETRY_INTERVAL_S)
        yield View(splash=splash("windfarm does not answer. “windfarm status” says why; then reload.")).outputs()

    return come_back


def splash(message: str = "", *, is_visible: bool = True) -> Any:
    text = notice(message, "status") or '<p class="wf-empty">Opening windfarm …</p>'
    return gr.HTML(f'<div class="wf-splash"><span class="wf-spinner"></span>{text}</div>', visible=is_visible)


def signed_out(message: str = "") -> View:
    chat, question, conversation_id, sources = fresh()
    return View(
        key="",
        splash=splash(is_visible=False),
        sign_in=gr.Column(visible=True),
        shell=gr.Row(visible=False),
        key_box="",
        sign_in_notice=notice(message),
        account="",
        documents="",
        conversations="",
        chat=chat,
        question=question,
        conversation_id=conversation_id,
        sources=sources,
    )


async def _signed_in(client: ApiClient, key: str, wanted_id: str) -> View:
    person, models, collections, conversations = await asyncio.gather(
        client.me(), client.models(), client.collections(), client.conversations()
    )
    conversation = await _wanted(client, wanted_id)
    names = [collection.name for collection in collections]
    chat, question, conversation_id, sources = opened(conversation) if conversation else fresh()
    model, chosen = choices_of(conversation) if conversation else (None, None)
    target = names[0] if names else None
    return View(
        key=key,
        splash=splash(is_visible=False),
        sign_in=gr.Column(visible=False),
        shell=gr.Row(visible=True),
        key_box="",
        sign_in_notice="",
        account=account(person.name),
        model=gr.Dropdown(choices=models, value=model if model in models else (models[0] if models else None)),
        collections=gr.Dropdown(choices=names, value=[name for name in chosen or [] if name in names]),
        target=gr.Dropdown(choices=names, value=target),
        documents=await documents_or_nothing(client, target),
        conversations=conversation_list(conversations, conversation_id),
        chat=chat,
        question=question,
        conversation_id=conversation_id,
        sources=sources,
    )


async def _wanted(client: ApiClient, conversation_id: str) -> Conversation | None:
    """The conversation that the page's address names, unless it was deleted or belongs to somebody else."""
    if not conversation_id:
        return None
    try:
        return await client.conversation(conversation_id)
    except ApiError as error:
        if error.status in (403, 404):
            return None
        raise
