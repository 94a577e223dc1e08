"""The list of conversations: show, open, rename, delete. The database holds them; the page keeps only the open one's
id, in its address, so that a reload and a shared tab come back to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr

from ui.api_client import ApiClient, ApiError
from ui.bubbles import bubbles
from ui.chatting import Connect, idle_box, newest_sources
from ui.notices import warn
from ui.panels import conversation_list, source_list
from ui.records import Conversation

Handler = Callable[..., Awaitable[Any]]


async def listed(client: ApiClient, current_id: str) -> str:
    return conversation_list(await client.conversations(), current_id)


def make_refresh(connect: Connect) -> Handler:
    async def refresh(key: str, current_id: str) -> Any:
        try:
            return await listed(connect(key), current_id)
        except ApiError as error:
            warn(error.message)
            return gr.skip()

    return refresh


def make_open(connect: Connect) -> Handler:
    async def open_conversation(key: str, event: gr.EventData) -> tuple[Any, ...]:
        """Values for: chat, question box, conversation id, sources, list, model, collections."""
        client = connect(key)
        try:
            conversation = await client.conversation(str(event._data["id"]))
            names = [collection.name for collection in await client.collections()]
            model, chosen = choices_of(conversation)
            known = [name for name in chosen if name in names]
            shown_list = await listed(client, conversation.id)
            return (*opened(conversation), shown_list, model or gr.skip(), gr.Dropdown(choices=names, value=known))
        except ApiError as error:
            warn(error.message)
            return (gr.skip(),) * 7

    return open_conversation


def make_rename(connect: Connect) -> Handler:
    async def rename(key: str, current_id: str, event: gr.EventData) -> Any:
        client = connect(key)
        title = str(event._data["title"]).strip()
        try:
            if title:
                await client.rename_conversation(str(event._data["id"]), title[:200])
            return await listed(client, current_id)
        except ApiError as error:
            warn(error.message)
            return gr.skip()

    return rename


def make_delete(connect: Connect) -> Handler:
    async def delete(key: str, current_id: str, event: gr.EventData) -> tuple[Any, ...]:
        """Values for: chat, question box, conversation id, sources, list."""
        client = connect(key)
        deleted_id = str(event._data["id"])
        try:
            await client.delete_conversation(deleted_id)
            if deleted_id != current_id:
                return (*(gr.skip(),) * 4, await listed(client, current_id))
            return (*fresh(), await listed(client, ""))
        except ApiError as error:
            warn(error.message)
            return (gr.skip(),) * 5

    return delete


def fresh() -> tuple[Any, ...]:
    """An empty chat: values for chat, question box, conversation id, sources."""
    return [], gr.Textbox(value="", submit_btn=True, stop_btn=False), "", source_list((), "")


def opened(conversation: Conversation) -> tuple[Any, ...]:
    return bubbles(conversation.messages), idle_box(), conversation.id, newest_sources(conversation)


def choices_of(conversation: Conversation) -> tuple[str | None, list[str]]:
    """The model and the collections that the conversation used last."""
    return conversation.model, list(conversation.collections)
