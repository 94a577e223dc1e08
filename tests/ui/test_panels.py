"""The lists beside the chat: right facts, nothing untrusted as HTML."""

from typing import Any

from ui.panels import (
    Upload,
    conversation_list,
    document_list,
    passage_view,
    source_list,
    unsupported_list,
    upload_list,
    upload_of,
)
from ui.records import Citation, Conversation, Document, DocumentView, Job, PageImage

EVIL = '"><script>alert(1)</script>'


def view(marked: str, before: str = "", after: str = "", **other: Any) -> DocumentView:
    fields = {"name": "memo.pdf", "is_current": True, "page": 2, "num_pages": 3, "is_beginning": True, "is_end": True}
    return DocumentView(before=before, marked=marked, after=after, **(fields | other))


def citation(text: str, start: int, document: str = "memo.pdf") -> Citation:
    return Citation(1, "doc_1", document, "memos", 2, start, start + len(text), text, 0.914)


def test_names_from_people_and_files_are_escaped_everywhere() -> None:
    document = Document(EVIL, EVIL, 3, EVIL)
    html = (
        conversation_list([Conversation(EVIL, EVIL)], "")
        + document_list(EVIL, [document])
        + source_list([citation(EVIL, 0, EVIL)], EVIL)
        + passage_view(view(EVIL, EVIL, EVIL, name=EVIL), citation(EVIL, 0))
        + passage_view(view(EVIL, name=EVIL, image=PageImage(EVIL, 1, 1)), citation(EVIL, 0))
        + passage_view(view(EVIL, name=EVIL), citation("changed" + EVIL, 0))
        + upload_list([Upload(EVIL, EVIL, 0.5, EVIL)])
    )
    assert "<script" not in html
    assert EVIL not in html


def test_the_passage_is_marked_where_it_stands() -> None:
    shown = passage_view(view("The fact.", "Before. ", " After."), citation("The fact.", 8))
    assert "Before. <mark>The fact.</mark> After." in shown and "…" not in shown
    cut = passage_view(
        view("The fact.", "before ", " after", is_beginning=False, is_end=False), citation("The fact.", 8)
    )
    assert "… before <mark>" in cut and "after …" in cut


def test_a_passage_of_an_older_version_is_shown_with_a_note() -> None:
    for changed in (view("Something new."), view("The fact.", is_current=False)):
        shown = passage_view(changed, citation("The fact.", 8))
        assert "<mark>The fact.</mark>" in shown
        assert "has changed since" in shown


def test_a_drawn_page_is_scrolled_to_its_mark_and_says_what_it_is() -> None:
    shown = passage_view(view("The fact.", image=PageImage("aGk=", 800, 1000, 0.25)), citation("The fact.", 8))
    assert 'src="data:image/png;base64,aGk="' in shown and 'style="top:25.00%"' in shown
    assert "Page 2 of memo.pdf; the cited passage is marked." in shown


def test_a_page_that_shows_the_passage_as_a_picture_gets_it_in_words() -> None:
    shown = passage_view(view("The fact.", image=PageImage("aGk=", 800, 1000)), citation("The fact.", 8))
    assert "<mark>The fact.</mark>" in shown and "cannot be marked" in shown and "wf-spot" not in shown


def test_a_source_says_document_page_score_and_collection() -> None:
    html = source_list([citation("x", 0)], "msg_1")
    assert all(fact in html for fact in ("memo.pdf", "Page 2", "Score 0.91", "memos"))


def test_a_failed_job_shows_its_reason_and_a_finished_one_its_passages() -> None:
    failed = upload_of(Job("j", "a.pdf", "failed", error="It is encrypted."))
    done = upload_of(Job("j", "a.pdf", "done", 1.0, num_chunks=1))
    assert (failed.state, failed.note) == ("failed", "It is encrypted.")
    assert done.note == "1 passage"


def test_an_unchanged_file_is_told_as_already_there() -> None:
    assert "Already there" in upload_of(Job("j", "a.pdf", "done", 1.0, 5, is_unchanged=True)).note


def test_a_running_upload_has_a_progress_bar_for_screen_readers() -> None:
    html = upload_list([Upload("a.pdf", "embedding", 0.42)])
    assert 'role="progressbar" aria-valuenow="42"' in html


def test_sentences_without_a_source_are_listed_and_escaped() -> None:
    html = unsupported_list([EVIL, "Cows fly."])
    assert "Not confirmed by your documents" in html and "Cows fly." in html and "<script" not in html
    assert unsupported_list([]) == ""


def test_measured_refusals_of_a_collection_stand_above_its_documents() -> None:
    assert "refuses 4 %" in document_list("memos", [Document("d", "a.pdf")], "It refuses 4 % of them.")
