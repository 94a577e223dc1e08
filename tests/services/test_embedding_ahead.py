"""Batches are computed ahead, as many as there are replicas to compute them, and come out in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from rag.errors import EmbedderUnavailable
from rag.types import Vectors
from services.embedding_ahead import EmbeddingAhead


class Replicas:
    """Each batch is one number, and its vector too. Computes where `gate` is open."""

    def __init__(self, num_replicas: int = 1) -> None:
        self.num_replicas = num_replicas
        self.is_away = False
        self.gate = asyncio.Event()
        self.asked: list[int] = []
        self.num_computing = self.most_computing = 0

    async def embed(self, texts: Sequence[str]) -> Vectors:
        self.asked.append(int(texts[0]))
        if self.is_away:
            raise EmbedderUnavailable("away")
        self.num_computing += 1
        self.most_computing = max(self.most_computing, self.num_computing)
        try:
            await self.gate.wait()
        finally:
            self.num_computing -= 1
        return np.full((len(texts), 1), float(texts[0]), dtype=np.float32)

    def ahead(self, num_batches: int) -> EmbeddingAhead:
        batches = ([str(number)] for number in range(num_batches))
        return EmbeddingAhead(self.embed, batches, lambda: self.num_replicas)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("num_replicas", "under_way"), [(1, 2), (3, 6), (0, 2)])
async def test_each_replica_has_one_batch_and_another_that_waits(num_replicas: int, under_way: int) -> None:
    replicas = Replicas(num_replicas)
    ahead = replicas.ahead(20)
    ahead.begin()
    await settle()
    assert replicas.asked == list(range(under_way))
    replicas.gate.set()
    assert [int((await ahead.next())[0, 0]) for _ in range(20)] == list(range(20))
    assert replicas.asked == list(range(20)) and replicas.most_computing == under_way


async def test_a_replica_that_joins_is_used_from_the_next_batch_on() -> None:
    replicas = Replicas(1)
    replicas.gate.set()
    ahead = replicas.ahead(20)
    await ahead.next()
    replicas.gate.clear()
    replicas.num_replicas = 2
    ahead.begin()
    await settle()
    assert replicas.num_computing == 3 and len(replicas.asked) == 5
    ahead.close()


async def test_a_model_that_is_away_is_asked_again_for_the_same_batch_and_only_when_somebody_wants_it() -> None:
    replicas = Replicas()
    replicas.gate.set()
    ahead = replicas.ahead(3)
    assert (await ahead.next())[0, 0] == 0
    await settle()
    replicas.is_away = True
    assert (await ahead.next())[0, 0] == 1 and (await ahead.next())[0, 0] == 2
    again = replicas.ahead(2)
    replicas.asked.clear()
    for _ in range(2):
        with pytest.raises(EmbedderUnavailable):
            await again.next()
        await settle()
    num_asked = len(replicas.asked)
    await settle()
    assert len(replicas.asked) == num_asked, "nobody asks by itself"
    replicas.is_away = False
    assert [(await again.next())[0, 0] for _ in range(2)] == [0, 1]


async def test_closing_ends_what_is_under_way() -> None:
    replicas = Replicas()
    ahead = replicas.ahead(5)
    ahead.begin()
    await settle()
    ahead.close()
    ahead.close()
    await settle()
    assert replicas.num_computing == 0 and replicas.asked == [0, 1]
