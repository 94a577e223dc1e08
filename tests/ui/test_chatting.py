"""How events become an answer, and what a model is told of earlier turns."""

from ui.chatting import Draft, _told, title_of
from ui.records import (
    Citation,
    Cited,
    ContextTrimmed,
    Message,
    Retrieved,
    TextAdded,
    ToolAnswered,
    ToolCalled,
    Trimmed,
)


def test_a_draft_grows_by_its_events() -> None:
    draft = Draft(doing="Searching your documents")
    citation = Citation(1, "d", "memo.pdf", "memos", None, 0, 1, "x", None)
    for event in (
        Retrieved(2),
        ContextTrimmed(Trimmed(1, 0, "long")),
        ToolCalled("a", "calculator", "{}"),
        ToolAnswered("a", "calculator", "2", False),
        TextAdded("It is "),
        TextAdded("two."),
        Cited((citation,), "It is two [1].", "found"),
    ):
        draft.apply(event)
    assert draft.message.content == "It is two [1]."
    assert draft.message.steps[0].result == "2"
    assert draft.message.trimmed == Trimmed(1, 0, "long")
    assert draft.doing is None


def test_what_goes_on_is_shown_until_text_comes() -> None:
    draft = Draft()
    draft.apply(Retrieved(1))
    assert draft.bubbles()[-1]["metadata"] == {"title": "Reading 1 passage", "status": "pending"}
    draft.apply(TextAdded("x"))
    assert "metadata" not in draft.bubbles()[-1]


def test_two_calls_of_one_tool_get_their_own_results() -> None:
    draft = Draft()
    for event in (
        ToolCalled("a", "calculator", "1"),
        ToolCalled("b", "calculator", "2"),
        ToolAnswered("a", "calculator", "one", False),
        ToolAnswered("b", "calculator", "two", False),
    ):
        draft.apply(event)
    assert [step.result for step in draft.message.steps] == ["one", "two"]


def test_questions_without_an_answer_are_not_told_to_the_model() -> None:
    history = (
        Message("user", "failed"),
        Message("user", "first"),
        Message("assistant", "answer"),
        Message("user", "stopped at once"),
        Message("assistant", ""),
    )
    assert [message.content for message in _told(history)] == ["first", "answer"]


def test_a_title_is_one_short_line() -> None:
    assert title_of("  What\nis this? ") == "What is this?"
    assert len(title_of("word " * 50)) <= 61
