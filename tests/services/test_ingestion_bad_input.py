"""Files and questions that nobody means well: they are taken or refused with a reason, and the next one works."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rag.parsing import DocumentParser, ParseLimits
from rag.tables import find_tables
from services.config import IngestionConfig
from services.errors import ApiError
from tests.services.filling import add_document
from tests.services.harness import error_of, running_endpoint
from tests.services.ingesting import OWNER, running
from tests.services.reading import found_by

LARGE_PASSAGES = IngestionConfig(chunk_tokens=512, chunk_overlap_tokens=0)


async def test_ten_megabytes_on_a_single_line_become_a_document(tmp_path: Path) -> None:
    """Long words, so that there are few tokens: what is tested is the one line."""
    line = " ".join(f"{'x' * 500}{number}" for number in range(20_000)) + " needle"
    assert len(line) > 10_000_000
    async with running(tmp_path, config=LARGE_PASSAGES) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", "line.txt", line)
        assert job["state"] == "done" and job["num_chunks"] >= 39, job["error"]
        assert windfarm.found("handbook", "needle")
        windfarm.check_agreement()


def test_a_table_of_a_million_rows_is_read_whole_within_the_usual_limits(tmp_path: Path) -> None:
    """How it is cut, each passage with the table's header, is tested with the tables."""
    file = tmp_path / "upload"
    with file.open("w") as out:
        out.write("number,name,value\n")
        out.writelines(f"{row},name {row},{row % 97}\n" for row in range(1_000_000))
    with DocumentParser(ParseLimits()) as parser:
        document = parser.parse_file(file, "million.csv")
    assert document.text.count("\n") == 1_000_001 and "999999,name 999999,26" in document.text[-40:]
    (table,) = find_tables(document.text, document.mime_type).tables
    assert table.header == "number,name,value"


async def test_a_collection_that_is_deleted_while_it_is_searched_gives_passages_or_is_not_there(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        collection = windfarm.knowledge.collection("handbook", OWNER)
        for number in range(20):
            add_document(
                windfarm.database,
                windfarm.store,
                windfarm.journal,
                collection,
                f"{number}.txt",
                "The same harbour.",
                32,
            )
        answers: list[set[str] | ApiError] = []
        has_searched, was_deleted = asyncio.Event(), asyncio.Event()

        async def search_on() -> None:
            while not was_deleted.is_set():
                try:
                    answers.append(await asyncio.to_thread(found_by, windfarm, OWNER, "harbour"))
                except ApiError as error:
                    answers.append(error)
                has_searched.set()

        searchers = [asyncio.create_task(search_on()) for _ in range(3)]
        await has_searched.wait()
        await windfarm.service.delete_collection("handbook", OWNER)
        was_deleted.set()
        await asyncio.gather(*searchers)  # any other error than that of the API would be raised here
        whole = {f"{number}.txt" for number in range(20)}
        assert answers[0] == whole, "it was there before"
        assert all(answer == whole or getattr(answer, "code", None) == "unknown_collection" for answer in answers)
        with pytest.raises(ApiError, match="no collection named 'handbook'"):
            found_by(windfarm, OWNER, "harbour")


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("../../etc/passwd.txt", "passwd.txt"),
        ("C:\\Windows\\system.txt", "system.txt"),
        ("nul\x00byte.txt", "nulbyte.txt"),
        ("evil\u202etxt.exe.txt", "eviltxt.exe.txt"),
        ("line\r\nbreak.txt", "line break.txt"),
    ],
)
async def test_names_are_labels_and_hide_nothing(tmp_path: Path, name: str, stored: str) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", name, "Some text.")
        assert (job["state"], job["filename"]) == ("done", stored)
        assert [each["name"] for each in windfarm.knowledge.list_documents("handbook", OWNER)] == [stored]
        assert {path.name for path in tmp_path.iterdir()} <= {
            *("windfarm.db", "windfarm.db-wal", "windfarm.db-shm", "windfarm.db.lock"),
            *("qdrant", "blobs", "originals"),
        }


async def test_a_question_of_a_hundred_thousand_characters_is_refused_by_its_length(tmp_path: Path) -> None:
    long = "wind " * 20_000
    async with running_endpoint(tmp_path) as running_:
        for path in ("/v1/collections/x/search", "/v1/vector_stores/x/search"):
            answer = await running_.http.post(path, json={"query": long})
            assert answer.status_code == 400 and error_of(answer)["param"].startswith("query")
            assert "20000" in error_of(answer)["message"] and len(answer.content) < 2000
        called = {"name": "search", "arguments": {"query": long}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": called}
        told = (await running_.http.post("/mcp", json=message)).json()["result"]
        assert told["isError"] and "20000" in told["content"][0]["text"] and len(str(told)) < 2000
        assert running_.store.asked == []
