"""Computes the texts of concurrent requests together, on one thread beside the event loop.

Questions go before documents, but never twice in a row while documents wait: a person who asks during a long ingestion
waits for one batch, and the ingestion still moves on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from cluster.engines.embedding import EmbeddingEngine, Vectors
from cluster.errors import EngineDead

MAX_BATCH_TOKENS = 1024
"""A batch of long texts stays short enough to wait for."""


@dataclass(eq=False, slots=True)
class _Request:
    rows: Vectors
    num_missing: int
    done: asyncio.Future[Vectors]


@dataclass(frozen=True, slots=True)
class _Item:
    token_ids: Sequence[int]
    request: _Request
    row: int


@dataclass(slots=True)
class _Queues:
    urgent: deque[_Item] = field(default_factory=deque)
    bulk: deque[_Item] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.urgent) + len(self.bulk)


class EmbeddingBatcher:
    """Feeds one engine. `start` and `close` belong to the event loop that uses it."""

    def __init__(self, engine: EmbeddingEngine, *, max_batch: int, batch_wait_s: float) -> None:
        self._engine = engine
        self._max_batch = max_batch
        self._batch_wait_s = batch_wait_s
        self._queues = _Queues()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedding")
        self._worker: asyncio.Task[None] | None = None
        self._was_urgent = False
        self._dead: str | None = None

    def start(self) -> None:
        self._worker = asyncio.create_task(self._work())

    async def embed(self, token_ids: Sequence[Sequence[int]], *, is_urgent: bool) -> Vectors:
        """Vectors in the order given. A caller that is cancelled frees its place."""
        self.check()
        if not token_ids:
            return np.zeros((0, self._engine.dimension), dtype=np.float32)
        rows = np.zeros((len(token_ids), self._engine.dimension), dtype=np.float32)
        request = _Request(rows, len(token_ids), asyncio.get_running_loop().create_future())
        queue = self._queues.urgent if is_urgent else self._queues.bulk
        # Neighbours of similar length need little padding.
        for row in sorted(range(len(token_ids)), key=lambda row: len(token_ids[row])):
            queue.append(_Item(token_ids[row], request, row))
        self._arrived.set()
        return await request.done

    def check(self) -> None:
        """Raise `EngineDead` when nothing can be computed any more."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        if self._worker is None or self._worker.done():
            raise EngineDead("The embedding service is not running.")

    @property
    def num_waiting(self) -> int:
        return len(self._queues)

    async def close(self) -> None:
        """End; whoever still waits gets `EngineDead`. Safe to call twice."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        self._fail_all("The embedding service was stopped.")
        self._engine.close()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            await self._wait_for_company()
            while len(self._queues):
                batch = self._next_batch()
                if batch:
                    await self._compute(batch)
            self._arrived.clear()

    async def _wait_for_company(self) -> None:
        """Texts that arrive within a moment share a batch. A full batch does not wait, nor does a question: somebody
        waits for its answer, and questions that come while it is computed share the next batch."""
        if self._batch_wait_s and not self._queues.urgent and len(self._queues) < self._max_batch:
            await asyncio.sleep(self._batch_wait_s)

    def _next_batch(self) -> list[_Item]:
        self._was_urgent = bool(self._queues.urgent) and not (self._was_urgent and self._queues.bulk)
        queue = self._queues.urgent if self._was_urgent else self._queues.bulk
        batch: list[_Item] = []
        num_tokens = 0
        while queue and len(batch) < self._max_batch:
            if queue[0].request.done.done():  # its caller is gone
                queue.popleft()
                continue
            num_tokens += len(queue[0].token_ids)
            if batch and num_tokens > MAX_BATCH_TOKENS:
                break
            batch.append(queue.popleft())
        return batch

    async def _compute(self, batch: list[_Item]) -> None:
        token_ids = [item.token_ids for item in batch]
        loop = asyncio.get_running_loop()
        try:
            vectors = await loop.run_in_executor(self._thread, self._engine.embed, token_ids)
        except asyncio.CancelledError:
            _fail(batch, EngineDead("The embedding service was stopped."))
            raise
        except EngineDead as error:
            self._dead = str(error)
            _fail(batch, error)
            self._fail_all(self._dead)
        except Exception as error:  # noqa: BLE001 - handed to those who wait; the next batch may work
            _fail(batch, error)
        else:
            for item, vector in zip(batch, vectors, strict=True):
                _deliver(item, vector)

    def _fail_all(self, reason: str) -> None:
        waiting = [*self._queues.urgent, *self._queues.bulk]
        self._queues.urgent.clear()
        self._queues.bulk.clear()
        _fail(waiting, EngineDead(reason))


def _deliver(item: _Item, vector: Vectors) -> None:
    request = item.request
    request.rows[item.row] = vector
    request.num_missing -= 1
    if request.num_missing == 0 and not request.done.done():
        request.done.set_result(request.rows)


def _fail(items: Sequence[_Item], error: Exception) -> None:
    for item in items:
        if not item.request.done.done():
            item.request.done.set_exception(error)
