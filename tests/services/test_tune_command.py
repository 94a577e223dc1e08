"""`windfarm tune` and `windfarm status` as people see them, against a running endpoint."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.cli import status_view
from tests.services.harness import running_endpoint
from tests.services.test_cli import run
from tests.services.test_tuning import write_set

TUNING = {
    "made_at": "2026-11-22T10:00:00+00:00",
    "source": "questions",
    "num_questions": 90,
    "num_judged": 61,
    "evidence_threshold": 0.8641,
    "errors": {"wrong_refusals": 0.047, "wrong_answers_far": 0.012, "wrong_answers_near": 0.41},
    "fusion": "dbsf",
    "dense_weight": 0.7,
    "ndcg@10": 0.978,
    "ndcg@10_before": 0.978,
}


async def test_questions_of_a_folder_reach_the_store_with_the_ids_of_its_documents(tmp_path: Path) -> None:
    folder, far = write_set(tmp_path / "own", "leave"), write_set(tmp_path / "far", "other")
    async with running_endpoint(tmp_path) as running:
        running.store.answers = {
            "list_documents": lambda name, actor: [{"id": "doc_1", "name": "leave.md"}],
            "tune": lambda name, questions, actor, **settings: {"name": name, "tuning": TUNING},
            "forget_tuning": lambda name, actor: {"name": name, "tuning": None},
        }
        where = ["--api", running.url, "--key", running.key]
        told = await asyncio.to_thread(run, "tune", "handbook", "--questions", str(folder), "--far", str(far), *where)
        assert told.returncode == 0, told.stderr
        assert "Threshold 0.8641, from 90 written questions." in told.stdout
        assert "4.7 % wrongly refused, wrongly answered 1.2 % of other topics and 41.0 %" in told.stdout
        asked = next(arguments for method, arguments in running.store.asked if method == "tune")
        assert asked[:2] == ("handbook", [("How long?", ["doc_1"]), ("How long?", [])])

        as_json = await asyncio.to_thread(run, "tune", "handbook", "--json", *where)
        assert json.loads(as_json.stdout)["tuning"] == TUNING
        assert running.store.asked[-1][1][1] is None, "without questions the store makes them"
        forgotten = await asyncio.to_thread(run, "tune", "handbook", "--forget", *where)
        assert forgotten.stdout == "Not tuned: the settings of the configuration hold.\n"
        wrong = await asyncio.to_thread(run, "tune", "handbook", "--far", str(far), *where)
        assert wrong.returncode == 1 and "--far needs --questions" in wrong.stderr


@pytest.mark.parametrize(("tuning", "said"), [(TUNING, "threshold 0.864: 4.7 % wrongly refused"), (None, "not tuned")])
def test_status_says_how_often_a_collection_refuses_wrongly(tuning: dict[str, Any] | None, said: str) -> None:
    printed = io.StringIO()
    collection = {"name": "handbook", "num_documents": 3, "num_chunks": 40, "tuning": tuning}
    Console(file=printed, width=200).print(status_view._collections([collection]))
    assert "handbook" in printed.getvalue() and said in printed.getvalue()
