"""The store's process is killed while people search and a file is on its way in: nothing is lost, answers come back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.product import Product

pytestmark = pytest.mark.e2e

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
FILES = ("fake-memo.pdf", "wiki.md", "simple.docx", "multi_page.pdf")


def test_a_killed_store_comes_back_under_search_load_and_loses_nothing(product: Product) -> None:
    with httpx.Client(base_url=product.address, headers=product.headers, timeout=120) as client:
        client.post("/v1/collections", json={"name": "restart"}).raise_for_status()
        first = upload(client, FILES[0], wait=True)
        assert first["state"] == "done"
        search = Search(product)
        search.start()
        try:
            search.until_answers(more=5)
            jobs = [upload(client, name, wait=False) for name in FILES[1:]]
            os.kill(store_process(product.home), signal.SIGKILL)
            search.until_answers(more=20)
            ended = [until_ended(client, job["id"]) for job in jobs]
        finally:
            search.stop()
        assert [job["state"] for job in ended] == ["done"] * len(jobs)
        assert set(search.statuses) <= {200, 503}, search.statuses
        assert search.num_empty == 0, "an answer without passages would be a loss that nobody notices"
        documents = client.get("/v1/collections/restart/documents").json()["data"]
        assert sorted(document["name"] for document in documents) == sorted(FILES)
        client.delete("/v1/collections/restart").raise_for_status()


class Search(threading.Thread):
    """Asks all the time and counts what comes."""

    def __init__(self, product: Product) -> None:
        super().__init__(daemon=True)
        self._product = product
        self._stopped = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.num_empty = 0

    def run(self) -> None:
        with httpx.Client(base_url=self._product.address, headers=self._product.headers, timeout=120) as client:
            while not self._stopped.wait(0.02):
                body = {"query": "How many bottles of water were delivered?", "top_k": 3}
                answer = client.post("/v1/collections/restart/search", json=body)
                self.statuses[answer.status_code] += 1
                self.num_empty += answer.status_code == 200 and not answer.json()["passages"]

    def until_answers(self, more: int) -> None:
        wanted, deadline = self.statuses[200] + more, time.monotonic() + 120
        while self.statuses[200] < wanted:
            assert time.monotonic() < deadline and self.is_alive(), f"no answers any more: {self.statuses}"
            time.sleep(0.05)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def upload(client: httpx.Client, name: str, *, wait: bool) -> dict[str, object]:
    with (DOCUMENTS / name).open("rb") as file:
        path = f"/v1/collections/restart/documents?wait={str(wait).lower()}"
        answer = client.post(path, files={"file": (name, file)})
    answer.raise_for_status()
    job: dict[str, object] = answer.json()["job"]
    return job


def until_ended(client: httpx.Client, job_id: object) -> dict[str, object]:
    deadline = time.monotonic() + 120
    while True:
        job: dict[str, object] = client.get(f"/v1/jobs/{job_id}").raise_for_status().json()
        if job["state"] in ("done", "failed", "cancelled"):
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.2)


def store_process(home: Path) -> int:
    """The store's replica of this very product: others may run on the machine."""
    marker = f"WINDFARM_HOME={home}".encode()
    for entry in Path("/proc").iterdir():
        try:
            if b"ServeReplica:store" in (entry / "cmdline").read_bytes() and marker in (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("no store process runs")
