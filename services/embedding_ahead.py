"""Vectors of a document's passages, computed ahead of whoever stores them.

Some batches are always under way, so that no embedding replica waits while passages are written, and several replicas
compute at the same time: calls through a Serve handle go to the one that is least busy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence

from rag.errors import EmbedderUnavailable
from rag.types import Vectors

BATCHES_PER_REPLICA = 2
"""One that is computed and one that waits for its turn."""

EmbedBatch = Callable[[Sequence[str]], Awaitable[Vectors]]


class EmbeddingAhead:
    """Batches of one document, in order. `num_replicas` may change while they are embedded."""

    def __init__(self, embed: EmbedBatch, batches: Iterator[Sequence[str]], num_replicas: Callable[[], int]) -> None:
        self._embed = embed
        self._batches = batches
        self._num_replicas = num_replicas
        self._under_way: list[tuple[Sequence[str], asyncio.Task[Vectors]]] = []

    def begin(self) -> None:
        """Compute the first batches, or those after what was taken."""
        while len(self._under_way) < BATCHES_PER_REPLICA * max(1, self._num_replicas()):
            if (batch := next(self._batches, None)) is None:
                return
            self._under_way.append((batch, self._start(batch)))

    async def next(self) -> Vectors:
        """Vectors of the next batch. Raises what the embedder raises; after `EmbedderUnavailable` the same batch may be
        asked for again. No more batches than there are may be asked for."""
        self.begin()
        batch, task = self._under_way[0]
        if task.done() and isinstance(task.exception(), EmbedderUnavailable):
            # It was computed ahead, or asked for before: the model may be back by now.
            task = self._start(batch)
            self._under_way[0] = (batch, task)
        vectors = await asyncio.shield(task)
        self._under_way.pop(0)
        self.begin()
        return vectors

    def close(self) -> None:
        """Nobody wants the rest. Safe to call twice."""
        for _, task in self._under_way:
            task.cancel()
        self._under_way.clear()
        self._batches = iter(())

    def _start(self, batch: Sequence[str]) -> asyncio.Task[Vectors]:
        task = asyncio.ensure_future(self._embed(batch))
        task.add_done_callback(_look_at_its_error)
        return task


def _look_at_its_error(task: asyncio.Future[Vectors]) -> None:
    """Where nobody waits for it any more, asyncio would log that its error was not looked at."""
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()
