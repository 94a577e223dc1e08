"""Replicas with a hash engine in this process, and the faults that end them: as a dead process, a dead engine, a hang
and an orderly stop look to the endpoint."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

from services.model_service import ModelService
from tests.chaos.hash_engine import HashEngine
from tests.services.harness import SECRET, Running

FAULTS = ("kill", "die", "hang", "drain")
_DRAIN_S = 0.1
_HANGS_S = 3.0


class Replica:
    """A model service whose end can be chosen."""

    def __init__(self, service: ModelService, engine: HashEngine) -> None:
        self.service = service
        self.engine = engine
        self._later: set[asyncio.Task[None]] = set()

    async def end(self, fault: str) -> None:
        """Returns at once; what follows a fault (Serve ends a replica that is not healthy) goes on behind it."""
        faults: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "kill": self._kill,
            "die": self._die,
            "hang": self._hang,
            "drain": self._drain,
        }
        task = asyncio.create_task(faults[fault](), name=fault)
        self._later.add(task)

    async def close(self) -> None:
        await asyncio.gather(*self._later)
        self._later.clear()
        await self.service.stop(drain_s=0)

    async def _kill(self) -> None:
        """The kernel resets every connection, nobody says goodbye, and the record stays behind."""
        beacon, self.service._beacon = self.service._beacon, None
        listener = self.service._listener
        assert beacon is not None and listener is not None
        await beacon._announcer.fall_silent()
        for server in listener._server.servers:
            server.close()
        for connection in list(listener._server.server_state.connections):
            connection.transport.abort()

    async def _die(self) -> None:
        self.engine.die()
        await self.service.stop(drain_s=0)

    async def _hang(self) -> None:
        """It goes on to announce itself, and its connections stay open, until its health check has failed."""
        self.engine.hang()
        await asyncio.sleep(_HANGS_S)
        await self._kill()

    async def _drain(self) -> None:
        await self.service.stop(drain_s=_DRAIN_S)


class Fleet:
    """The replicas of one model behind a running endpoint."""

    def __init__(self, running: Running, *, pace_s: float, num_slots: int = 1000) -> None:
        self._running = running
        self._pace_s = pace_s
        self._num_slots = num_slots
        self._numbers = itertools.count()
        self._ended: list[Replica] = []
        self.alive: list[Replica] = []

    async def grow(self, pace_s: float | None = None, identity: str = "") -> Replica:
        pace_s = self._pace_s if pace_s is None else pace_s
        engine = HashEngine(pace_s=pace_s, num_slots=self._num_slots, identity=identity)
        service = ModelService(
            engine, SECRET, app="llm-tiny", replica_id=f"replica-{next(self._numbers)}", beats=self._running.beats
        )
        await service.start()
        await self._running.directory.refresh()
        self.alive.append(Replica(service, engine))
        return self.alive[-1]

    @property
    def answering(self) -> list[Replica]:
        return [replica for replica in self.alive if replica.engine.load[0]]

    async def answers(self, num_tokens: int) -> None:
        """Returns when so many more tokens have been sampled and some replica is at it."""
        until = self._num_tokens + num_tokens
        while not self.answering or self._num_tokens < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def lose(self, replica: Replica, fault: str) -> None:
        self.alive.remove(replica)
        self._ended.append(replica)
        await replica.end(fault)

    @property
    def _num_tokens(self) -> int:
        return sum(replica.engine.num_tokens for replica in (*self.alive, *self._ended))

    async def close(self) -> None:
        for replica in [*self.alive, *self._ended]:
            await replica.close()
