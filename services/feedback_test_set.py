"""Accepted feedback as a test set for retrieval, in the layout that `windfarm eval retrieval` reads.

The corpus is every document of the collections that the questions were asked of, as the person who writes it may read
them: a question is only as hard as what else could be found. Everything comes over the public API.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.api_client import ApiClient
from services.setup_errors import ConfigError


@dataclass(frozen=True, slots=True)
class WrittenSet:
    """`num_left_out` counts accepted questions whose documents are gone or may not be read."""

    num_queries: int
    num_documents: int
    num_left_out: int

    @property
    def numbers(self) -> dict[str, int]:
        return asdict(self)


def write_test_set(client: ApiClient, folder: Path, collection: str | None = None) -> WrittenSet:
    """Write corpus.jsonl, queries.jsonl and qrels.tsv. Raises `ConfigError` where there is nothing to write or the
    folder holds something already."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty. Name a new folder.")
    accepted = [entry for entry in client.feedback("accepted") if collection in (None, *entry["collections"])]
    if not accepted:
        where = f" about {collection}" if collection else ""
        raise ConfigError(
            f"No feedback{where} was accepted yet. `windfarm feedback list` shows what waits; accept with "
            "`windfarm feedback accept ID`."
        )
    names = {collection} if collection else {name for entry in accepted for name in entry["collections"]}
    documents = {document["id"]: document for name in sorted(names) for document in _documents(client, name)}
    questions = [(entry, [d for d in entry["relevant"] if d in documents]) for entry in accepted]
    usable = [(entry, relevant) for entry, relevant in questions if relevant]
    if not usable:
        raise ConfigError(
            "None of the documents that hold the answers can be read any more, so there is no test set to write."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "corpus.jsonl", (_corpus_line(document) for document in documents.values()))
    _write_lines(folder / "queries.jsonl", ({"_id": e["id"], "text": e["question"]} for e, _ in usable))
    rows = [f"{entry['id']}\t{document_id}\t1\n" for entry, relevant in usable for document_id in relevant]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8")
    return WrittenSet(len(usable), len(documents), len(accepted) - len(usable))


def _documents(client: ApiClient, collection: str) -> Iterator[dict[str, Any]]:
    known = {entry["name"] for entry in client.collections()}
    if collection not in known:
        return
    for document in client.documents(collection):
        yield client.document(collection, document["id"])


def _corpus_line(document: dict[str, Any]) -> dict[str, str]:
    return {"_id": document["id"], "title": document.get("title") or "", "text": document["text"]}


def _write_lines(path: Path, records: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
