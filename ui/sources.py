"""Opening a citation: its passage, marked inside the text of its document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr

from ui.api_client import ApiClient, ApiError
from ui.chatting import Connect, answer_sources
from ui.notices import warn
from ui.panels import passage_unavailable, passage_view
from ui.records import Citation


def make_show_source(connect: Connect) -> Callable[..., Awaitable[Any]]:
    async def show(key: str, conversation_id: str, event: gr.EventData) -> Any:
        client = connect(key)
        message_id, number = str(event._data["message"]), int(event._data["number"])
        try:
            messages = (await client.conversation(conversation_id)).messages
        except ApiError as error:
            warn(error.message)
            return gr.skip()
        message = next((message for message in messages if message.id == message_id), None)
        if message is None:
            return gr.skip()
        citation = next((citation for citation in message.citations if citation.number == number), None)
        if citation is None:
            return answer_sources(message)
        return answer_sources(message, number, await _view(client, citation))

    return show


async def _view(client: ApiClient, citation: Citation) -> str:
    try:
        return passage_view(await client.view(citation), citation)
    except ApiError as error:
        return passage_unavailable(citation, error.message)
