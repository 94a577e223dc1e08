"""Thumbs in the chat: they reach the message that was rated, with the reason that was chosen."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pytest

from ui.bubbles import bubbles
from ui.feedback import OPTIONS, REASONS, make_rate, message_at
from ui.records import Conversation, Message, ToolStep

MESSAGES = (
    Message("user", "First?", "m1"),
    Message("assistant", "Yes.", "m2", steps=(ToolStep("calculator", "1+1", "2"),), evidence="quoted"),
    Message("user", "Second?", "m3"),
    Message("assistant", "No.", "m4"),
)


class Client:
    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    async def conversation(self, conversation_id: str) -> Conversation:
        return Conversation(conversation_id, "title", messages=MESSAGES)

    async def give_feedback(self, *what: Any) -> None:
        self.given.append(what)


def test_every_bubble_belongs_to_its_message() -> None:
    owners = [message.id for message in MESSAGES for _ in bubbles([message])]
    assert [getattr(message_at(MESSAGES, index), "id", None) for index in range(len(owners))] == owners
    assert owners == ["m1", "m2", "m2", "m2", "m3", "m4"] and message_at(MESSAGES, 99) is None


@pytest.mark.parametrize(
    ("index", "liked", "given"),
    [
        (5, True, ("c", "m4", "up", "")),
        (2, False, ("c", "m2", "down", "")),
        ([5, 0], "Like", ("c", "m4", "up", "")),
        (3, REASONS[0], ("c", "m2", "down", REASONS[0])),
        (0, True, None),
    ],
)
async def test_a_thumb_rates_the_answer_under_which_it_stands(
    monkeypatch: pytest.MonkeyPatch, index: Any, liked: Any, given: Any
) -> None:
    said: list[str] = []
    monkeypatch.setattr("ui.feedback.thank", said.append)
    monkeypatch.setattr("ui.feedback.warn", said.append)
    client = Client()
    event = gr.LikeData(None, {"index": index, "value": "x", "liked": liked})
    await make_rate(lambda key: client)("key", "c", event)  # type: ignore[arg-type, return-value]
    assert client.given == ([given] if given else []) and len(said) == 1


def test_the_first_two_options_are_the_thumbs_of_gradio() -> None:
    assert OPTIONS[:2] == ("Like", "Dislike") and len(set(OPTIONS)) == len(OPTIONS)
