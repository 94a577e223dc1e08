"""Thumbs under an answer, with a reason: what the reader says goes to windfarm and nowhere else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import gradio as gr

from ui.api_client import ApiClient, ApiError
from ui.bubbles import bubbles
from ui.notices import thank, warn
from ui.records import Message

REASONS = (
    "It is wrong",
    "The citation does not say this",
    "The documents do say it",
    "It is incomplete",
    "It is out of date",
)
OPTIONS = ("Like", "Dislike", *REASONS)
"""The first two are drawn as thumbs, the others stand under a flag: a thumb down with that reason."""


def make_rate(connect: Callable[[str], ApiClient]) -> Callable[..., Awaitable[None]]:
    async def rate(key: str, conversation_id: str, event: gr.LikeData) -> None:
        if not conversation_id:
            return
        client = connect(key)
        index = event.index if isinstance(event.index, int) else event.index[0]
        rating, reason = _said(event.liked)
        try:
            message = message_at((await client.conversation(conversation_id)).messages, index)
            if message is None or message.role != "assistant":
                warn("Only answers that are complete can be rated.")
                return
            await client.give_feedback(conversation_id, message.id, rating, reason)
        except ApiError as error:
            warn(error.message)
            return
        thank("Thank you. Your feedback is kept with the question and the answer.")

    return rate


def message_at(messages: Sequence[Message], index: int) -> Message | None:
    """The message that the bubble with this number belongs to: an answer may have several."""
    position = 0
    for message in messages:
        position += len(bubbles([message]))
        if index < position:
            return message
    return None


def _said(liked: bool | str) -> tuple[str, str]:
    if isinstance(liked, str) and liked in REASONS:
        return "down", liked
    return ("up" if liked in (True, "Like") else "down"), ""
