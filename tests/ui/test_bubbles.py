"""What a reader sees of each kind of message."""

from typing import Any

from ui.bubbles import bubbles
from ui.records import Citation, Message, ToolStep, Trimmed

CITATION = Citation(1, "doc_1", "memo.pdf", "memos", 2, 0, 4, "text", 0.9)


def titles(message: Message) -> list[str]:
    return [bubble["metadata"]["title"] for bubble in bubbles([message]) if "metadata" in bubble]


def text_of(drawn: list[dict[str, Any]]) -> str:
    return "\n".join(bubble["content"] for bubble in drawn)


def test_an_answer_links_its_citations() -> None:
    drawn = bubbles([Message("assistant", "So it is [1].", "msg_1", citations=(CITATION,))])
    assert "#cite-msg_1-1" in drawn[-1]["content"]


def test_tool_steps_are_folded_with_what_was_asked_and_answered() -> None:
    drawn = bubbles([Message("assistant", "2", steps=(ToolStep("calculator", '{"expression":"1+1"}', "2"),))])
    assert drawn[0]["metadata"] == {"title": "Tool: calculator", "status": "done"}
    assert '{"expression":"1+1"}' in drawn[0]["content"]


def test_a_running_tool_is_pending() -> None:
    drawn = bubbles([Message("assistant", "", steps=(ToolStep("calculator", "{}"),))])
    assert drawn[0]["metadata"]["status"] == "pending"


def test_a_failed_tool_says_so() -> None:
    assert titles(Message("assistant", "", steps=(ToolStep("calculator", "{}", "bad", True),))) == [
        "Tool: calculator failed"
    ]


def test_missing_evidence_and_trimmed_context_are_told() -> None:
    message = Message("assistant", "No.", trimmed=Trimmed(2, 1, "full"), evidence="none")
    assert titles(message) == ["Left out: 2 older messages and 1 passage", "The documents do not say"]


def test_an_answer_that_no_passage_supports_is_marked() -> None:
    assert titles(Message("assistant", "Guessed.", evidence="found")) == ["Not confirmed by your documents"]
    assert titles(Message("assistant", "So [1].", citations=(CITATION,), evidence="found")) == []


def test_a_stopped_answer_says_so_after_its_text() -> None:
    drawn = bubbles([Message("assistant", "half", state="stopped")])
    assert [drawn[0]["content"], drawn[1]["metadata"]["title"]] == ["half", "Stopped"]


def test_no_part_of_a_message_can_carry_tags() -> None:
    evil = "<img src=x onerror=alert(1)>"
    message = Message("assistant", evil, steps=(ToolStep(evil, "{}", "x"),), trimmed=Trimmed(1, 0, evil))
    drawn = bubbles([Message("user", evil), message])
    assert "<img" not in text_of(drawn)
    assert drawn[1]["metadata"]["title"].startswith(r"Tool: \<img")


def test_a_tool_cannot_name_itself_as_an_image() -> None:
    drawn = bubbles([Message("assistant", "", steps=(ToolStep("![x](http://foreign.example/a.png)", "{}", "x"),))])
    assert drawn[0]["metadata"]["title"].startswith(r"Tool: \!\[x\]\(")


def test_a_sentence_without_a_source_says_so_where_it_stands() -> None:
    content = "Leave lasts twelve weeks [1]. Cows fly.\n\nIt is paid [1]."
    start = content.index("Cows")
    message = Message(
        "assistant", content, "msg_1", citations=(CITATION,), evidence="found", unsupported=((start, start + 9),)
    )
    drawn = bubbles([message])[-1]["content"]
    assert "Cows fly. *(not confirmed)*\n\nIt is paid" in drawn
    assert drawn.count("not confirmed") == 1


def test_what_was_searched_for_is_shown_where_it_is_not_the_question() -> None:
    drawn = bubbles([Message("assistant", "Ten weeks.", query="How long is leave in Italy?")])
    assert "How long is leave in Italy?" in drawn[0]["content"]
