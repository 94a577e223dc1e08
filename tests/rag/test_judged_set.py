"""Test sets are read whole or refused with file, line and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rag.errors import EvaluationError
from rag.judged_set import read_judged_set

DATA = Path(__file__).parents[1] / "data" / "multilingual-qa-mini"
CORPUS = [{"_id": "d1", "title": "One", "text": "first"}, {"_id": "d2", "title": "", "text": "second"}]
QUERIES = [{"_id": "q1", "text": "first?"}, {"_id": "q2", "text": "second?"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td2\t1\n"


def lines(records: list[dict[str, object]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus.jsonl").write_text(lines(CORPUS))  # type: ignore[arg-type]
    (tmp_path / "queries.jsonl").write_text(lines(QUERIES))  # type: ignore[arg-type]
    (tmp_path / "qrels.tsv").write_text(QRELS)
    return tmp_path


def test_a_sound_set_is_read_with_its_grades(folder: Path) -> None:
    judged = read_judged_set(folder)
    assert [(document.id, document.title, document.text) for document in judged.documents] == [
        ("d1", "One", "first"),
        ("d2", "", "second"),
    ]
    assert [(query.id, query.text, dict(query.judgements)) for query in judged.queries] == [
        ("q1", "first?", {"d1": 2}),
        ("q2", "second?", {"d2": 1}),
    ]
    assert judged.num_left_out == 0


@pytest.mark.parametrize(("language", "num_documents", "num_queries"), [("en", 60, 354), ("fr", 183, 913)])
def test_the_committed_sets_are_sound(language: str, num_documents: int, num_queries: int) -> None:
    judged = read_judged_set(DATA / language)
    assert (len(judged.documents), len(judged.queries)) == (num_documents, num_queries)


def test_judgements_may_lack_a_header_and_lie_in_a_folder(folder: Path) -> None:
    text = "q1\td1\t1\r\nq2\td2\t1\r\n"
    (folder / "qrels.tsv").unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels" / "dev.tsv").write_text(text)
    assert len(read_judged_set(folder).queries) == 2
    (folder / "qrels" / "test.tsv").write_text("q1\td1\t1\n")
    assert read_judged_set(folder).num_left_out == 1, "test.tsv comes before other splits"


def test_questions_without_a_relevant_document_are_left_out_and_counted(folder: Path) -> None:
    (folder / "qrels.tsv").write_text("q1\td1\t1\nq2\td2\t0\nq2\td1\t-1\n")
    judged = read_judged_set(folder)
    assert [query.id for query in judged.queries] == ["q1"]
    assert judged.num_left_out == 1


def test_ids_may_be_numbers_titles_may_be_missing_and_texts_hold_any_separator(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text(
        '\ufeff{"_id": 1, "text": "a\u2028b"}\n\n{"_id": "d2", "title": null, "text": ""}\n'
    )
    (folder / "qrels.tsv").write_text("q1\t1\t1\n")
    judged = read_judged_set(folder)
    assert [(document.id, document.title) for document in judged.documents] == [("1", ""), ("d2", "")]
    assert judged.documents[0].text == "a\u2028b"


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text.encode("utf-8", "surrogateescape")) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def split(folder: Path) -> None:
    (folder / "qrels.tsv").unlink()
    (folder / "qrels").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / "qrels" / name).write_text("q1\td1\t1\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("corpus.jsonl"), r"corpus\.jsonl is missing\. A test set has corpus"),
        (remove("queries.jsonl"), r"queries\.jsonl is missing"),
        (remove("qrels.tsv"), r"qrels\.tsv is missing.*qrels/test\.tsv"),
        (split, r"several files \(dev\.tsv, train\.tsv\).*Copy the one to use"),
        (write("corpus.jsonl", ""), r"corpus\.jsonl holds no documents\. Put one"),
        (write("queries.jsonl", "\n\n"), r"queries\.jsonl holds no questions"),
        (write("qrels.tsv", "query-id\tcorpus-id\tscore\n"), r"qrels\.tsv holds no judgements"),
        (write("qrels.tsv", "q1\td1\t0\n"), r"judges no document relevant to any question"),
        (write("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": \n'), r"corpus\.jsonl, line 2 is no JSON"),
        (write("corpus.jsonl", '["d1"]\n'), r"corpus\.jsonl, line 1 is no JSON object"),
        (write("corpus.jsonl", '{"text": "a"}\n'), r"line 1: `_id` is missing"),
        (write("corpus.jsonl", '{"_id": true, "text": "a"}\n'), r"line 1: `_id` is missing or no text"),
        (write("corpus.jsonl", '{"_id": "d1"}\n'), r"line 1: `text` is missing"),
        (write("corpus.jsonl", '{"_id": "d1", "text": 3}\n'), r"line 1: `text` is no text"),
        (write("corpus.jsonl", '{"_id": "d1", "text": " "}\n'), r"1 documents without any text"),
        (
            write("corpus.jsonl", '{"_id": "d1", "text": "a"}\n\n{"_id": "d1", "text": "b"}\n'),
            r"line 3: the id 'd1' stands twice \(first in line 1\)",
        ),
        (write("queries.jsonl", '{"_id": "q1", "text": " "}\n'), r"queries\.jsonl, line 1: the question 'q1' is empty"),
        (write("qrels.tsv", "q1 d1 1\n"), r"qrels\.tsv, line 1: 1 fields instead of three"),
        (write("qrels.tsv", "q1\t0\td1\t1\n"), r"line 1: 4 fields"),
        (write("qrels.tsv", "q1\td1\thigh\n"), r"line 1: the grade 'high' is no whole number"),
        (write("qrels.tsv", QRELS + "q2\td1\t0.5\n"), r"line 4: the grade '0\.5' is no whole number"),
        (write("qrels.tsv", QRELS + "q9\td1\t1\n"), r"line 4: there is no question 'q9' in queries\.jsonl"),
        (write("qrels.tsv", QRELS + "q1\td9\t1\n"), r"line 4: there is no document 'd9' in corpus\.jsonl"),
        (write("qrels.tsv", QRELS + "q1\td1\t1\n"), r"line 4: 'q1' and 'd1' are judged twice \(first in line 2\)"),
        (write("queries.jsonl", '{"_id": "q1", "text": "a"}\n\udcff'), r"queries\.jsonl is not UTF-8 text"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(EvaluationError, match=message):
        read_judged_set(folder)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere is not a folder\. A test set has corpus\.jsonl"):
        read_judged_set(tmp_path / "nowhere")
