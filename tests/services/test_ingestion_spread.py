"""An ingest gives every embedding replica something to do: with one large file as well as with many small ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.services.ingesting import OWNER, HashEmbedder, running
from tests.services.test_jobs import wait_until

NUM_REPLICAS = 3
LARGE = "\n\n".join(f"Paragraph {number} says that the harbour opens at nine." for number in range(2000))


class CountingEmbedder(HashEmbedder):
    """Counts the calls that wait behind its gate."""

    num_under_way = 0

    async def embed_passages(self, texts: Sequence[str]) -> Any:
        self.num_under_way += 1
        try:
            return await super().embed_passages(texts)
        finally:
            self.num_under_way -= 1


@pytest.mark.parametrize("files", [{"large.txt": LARGE}, {f"{number}.txt": f"Note {number}." for number in range(12)}])
async def test_all_replicas_are_busy_and_every_file_is_stored_once(tmp_path: Path, files: dict[str, str]) -> None:
    embedder = CountingEmbedder()
    embedder.gate.clear()
    async with running(tmp_path, embedder=embedder, num_replicas=NUM_REPLICAS) as windfarm:
        windfarm.create()
        jobs = [await windfarm.service.submit("handbook", name, text.encode(), OWNER) for name, text in files.items()]

        async def every_replica_has_two() -> bool:
            return embedder.num_under_way >= 2 * NUM_REPLICAS

        await wait_until(every_replica_has_two)
        embedder.gate.set()
        ended = [await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=60) for job in jobs]
        assert {job["state"] for job in ended} == {"done"}
        assert embedder.num_texts == sum(job["num_chunks"] for job in ended), "nothing was embedded twice"
        windfarm.check_agreement()


async def test_a_cancelled_job_leaves_no_batch_under_way(tmp_path: Path) -> None:
    embedder = CountingEmbedder()
    embedder.gate.clear()
    async with running(tmp_path, embedder=embedder, num_replicas=NUM_REPLICAS) as windfarm:
        windfarm.create()
        job = await windfarm.service.submit("handbook", "large.txt", LARGE.encode(), OWNER)

        async def is_busy() -> bool:
            return embedder.num_under_way >= 2 * NUM_REPLICAS

        async def is_idle() -> bool:
            return embedder.num_under_way == 0

        await wait_until(is_busy)
        await windfarm.service.change_job(job["id"], "cancel", OWNER)
        await wait_until(is_idle)
        ended = await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=60)
        assert ended["state"] == "cancelled"
        index_id = windfarm.knowledge.collection("handbook", OWNER).index_id
        assert await asyncio.to_thread(windfarm.store.count, index_id) == 0
