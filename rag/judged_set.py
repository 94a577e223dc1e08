"""Reads a test set for retrieval in the layout of BEIR: documents, questions, and which document answers which.

`corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and `qrels.tsv` (question, document, grade;
a header is allowed), or `qrels/test.tsv` in place of the last one. Strict: an id that leads nowhere or stands twice
would quietly shift every number, so it is an error that names file and line. Thakur et al., "BEIR", NeurIPS 2021.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import EvaluationError

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels.tsv"
QRELS_FOLDER, QRELS_SPLIT = "qrels", "test.tsv"
_LAYOUT = f"A test set has {CORPUS}, {QUERIES} and {QRELS} (or {QRELS_FOLDER}/{QRELS_SPLIT})"


@dataclass(frozen=True, slots=True)
class JudgedDocument:
    """`title` and `text` may be empty: such documents are part of the pool, they are only never found."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class JudgedQuery:
    """A question with the grades of the documents that were judged for it; at least one is above zero."""

    id: str
    text: str
    judgements: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class JudgedSet:
    """`num_left_out` counts questions that no document is relevant to, so that no ranking could be right or wrong."""

    folder: Path
    documents: tuple[JudgedDocument, ...]
    queries: tuple[JudgedQuery, ...]
    num_left_out: int


def read_judged_set(folder: Path) -> JudgedSet:
    """Raises `EvaluationError` where the folder does not hold a whole and sound set."""
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is not a folder. {_LAYOUT}; name the folder that holds them.")
    documents = _read_documents(folder / CORPUS)
    texts = _read_queries(folder / QUERIES)
    qrels = _find_qrels(folder)
    judged = _read_qrels(qrels, texts, documents)
    queries = tuple(
        JudgedQuery(query, text, judged[query])
        for query, text in texts.items()
        if any(grade > 0 for grade in judged.get(query, {}).values())
    )
    if not queries:
        raise EvaluationError(f"{qrels} judges no document relevant to any question. Give at least one grade above 0.")
    return JudgedSet(folder, tuple(documents.values()), queries, len(texts) - len(queries))


def _read_documents(path: Path) -> dict[str, JudgedDocument]:
    documents = {
        identity: JudgedDocument(identity, _text(record, "title", place, ""), _text(record, "text", place))
        for place, identity, record in _records(path)
    }
    if not documents:
        raise EvaluationError(f"{path} holds no documents. Put one JSON object a line into it: _id, title, text.")
    if not any(document.title.strip() or document.text.strip() for document in documents.values()):
        raise EvaluationError(f"{path} holds {len(documents)} documents without any text. Fill their `text`.")
    return documents


def _read_queries(path: Path) -> dict[str, str]:
    queries: dict[str, str] = {}
    for place, identity, record in _records(path):
        queries[identity] = _text(record, "text", place)
        if not queries[identity].strip():
            raise EvaluationError(f"{place}: the question {identity!r} is empty. Write its `text`, or remove the line.")
    if not queries:
        raise EvaluationError(f"{path} holds no questions. Put one JSON object a line into it: _id, text.")
    return queries


def _find_qrels(folder: Path) -> Path:
    for path in (folder / QRELS, folder / QRELS_FOLDER / QRELS_SPLIT):
        if path.is_file():
            return path
    others = sorted((folder / QRELS_FOLDER).glob("*.tsv"))
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(path.name for path in others)
        raise EvaluationError(
            f"{folder / QRELS_FOLDER} holds several files ({names}) and no {QRELS_SPLIT}. Copy the one to use to "
            f"{folder / QRELS}."
        )
    raise EvaluationError(f"{folder / QRELS} is missing. {_LAYOUT}.")


def _read_qrels(
    path: Path, queries: Mapping[str, str], documents: Mapping[str, JudgedDocument]
) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    lines_of: dict[tuple[str, str], int] = {}
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 3:
            raise EvaluationError(
                f"{place}: {len(fields)} fields instead of three. Write question id, document id and grade with tabs "
                "between them."
            )
        query, document, grade = fields
        if not _is_whole(grade):
            if number == 1 and query not in queries:
                continue  # the header
            raise EvaluationError(f"{place}: the grade {grade!r} is no whole number. Use 0 for not relevant, else 1.")
        _check_known(place, "question", query, queries, QUERIES)
        _check_known(place, "document", document, documents, CORPUS)
        if (query, document) in lines_of:
            raise EvaluationError(
                f"{place}: {query!r} and {document!r} are judged twice (first in line {lines_of[query, document]}). "
                "Remove one of the lines."
            )
        lines_of[query, document] = number
        judged.setdefault(query, {})[document] = int(grade)
    if not judged:
        raise EvaluationError(f"{path} holds no judgements. Write question id, document id and grade, tabs between.")
    return judged


def _check_known(place: str, kind: str, identity: str, known: Mapping[str, Any], file: str) -> None:
    if identity not in known:
        raise EvaluationError(f"{place}: there is no {kind} {identity!r} in {file}. Add it there, or remove the line.")


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _records(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place for messages, id, object) of each line."""
    lines_of: dict[str, int] = {}
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{place} is no JSON ({error}). Put one whole object on each line.") from error
        if not isinstance(record, dict):
            raise EvaluationError(f"{place} is no JSON object. Write {{...}} with `_id` and `text`.")
        identity = record.get("_id")
        if isinstance(identity, int) and not isinstance(identity, bool):
            identity = str(identity)
        if not isinstance(identity, str) or not identity.strip():
            raise EvaluationError(f"{place}: `_id` is missing or no text. Give each line an id of its own.")
        identity = identity.strip()
        if identity in lines_of:
            raise EvaluationError(
                f"{place}: the id {identity!r} stands twice (first in line {lines_of[identity]}). Ids must be unique."
            )
        lines_of[identity] = number
        yield place, identity, record


def _text(record: Mapping[str, Any], name: str, place: str, default: str | None = None) -> str:
    value = record.get(name)
    value = default if value is None else value
    if not isinstance(value, str):
        raise EvaluationError(
            f"{place}: `{name}` is {'missing' if value is None else 'no text'}. Write it as a string."
        )
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; empty ones are left out. Only line feeds end a line: JSON may hold other separators."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} is missing. {_LAYOUT}.") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text after line {number} ({error.reason}). Convert it.") from error
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}. Check the file and its rights.") from error
