"""The lists beside the chat: right facts, nothing untrusted as HTML."""

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
from ui.records import Citation, Conversation, Document, Job

EVIL = '"><script>alert(1)</script>'


def citation(text: str, start: int, document: str = "memo.pdf") -> Citation:
    return Citation(1, "doc_1", document, "memos", 2, start, start + len(text), text, 0.914)


def test_names_from_people_and_files_are_escaped_everywhere() -> None:
    document = Document(EVIL, EVIL, 3, EVIL)
    html = (
        conversation_list([Conversation(EVIL, EVIL)], "")
        + document_list(EVIL, [document])
        + source_list([citation(EVIL, 0, EVIL)], EVIL)
        + passage_view(document, citation(EVIL, 0))
        + passage_view(document, citation("changed" + EVIL, 0))
        + upload_list([Upload(EVIL, EVIL, 0.5, EVIL)])
    )
    assert "<script" not in html
    assert EVIL not in html


def test_the_passage_is_marked_where_it_stands() -> None:
    document = Document("doc_1", "memo.pdf", 1, "Before. The fact. After.")
    assert "Before. <mark>The fact.</mark> After." in passage_view(document, citation("The fact.", 8))


def test_a_passage_of_an_older_version_is_shown_with_a_note() -> None:
    document = Document("doc_1", "memo.pdf", 1, "Something new.")
    view = passage_view(document, citation("The fact.", 8))
    assert "<mark>The fact.</mark>" in view
    assert "has changed since" in view


def test_a_long_document_is_cut_around_its_passage() -> None:
    text = "a" * 20_000 + "FACT" + "b" * 20_000
    view = passage_view(Document("doc_1", "memo.pdf", 1, text), citation("FACT", 20_000))
    assert "<mark>FACT</mark>" in view
    assert len(view) < 14_000


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
