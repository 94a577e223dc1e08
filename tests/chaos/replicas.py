"""Replicas with a hash engine in this process, and the faults that end them: as a dead process, a dead engine, a hang
and an orderly stop look to the endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from cluster.engine import Engine, EngineLoad, GenerationChunk, GenerationRequest
from cluster.expert_load import ExpertLoad
from services.model_service import ModelService
from tests.chaos.hash_engine import HashEngine
from tests.services.harness import SECRET, Running, wait_until

FAULTS = ("kill", "die", "hang", "drain")
_DRAIN_S = 0.1
HANGS_S = 3.0


class PausingEngine:
    """Answers of another engine, which stop after so many chunks for ever; the rest of an answer comes as a whole. It
    neither starts nor ends the other one."""

    def __init__(self, engine: Engine, num_chunks: int) -> None:
        self._engine = engine
        self._num_chunks = num_chunks
        self.has_paused = False
        self.rests: list[GenerationRequest] = []
        """Requests for the rest of an answer."""
        self.info = engine.info

    @property
    def load(self) -> EngineLoad:
        return self._engine.load

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def check_health(self) -> None: ...

    async def expert_load(self) -> ExpertLoad | None:
        return None

    async def tokenize(self, text: str) -> list[int]:
        return await self._engine.tokenize(text)

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        return await self._engine.count_prompt_tokens(request)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        if request.delivered is not None:
            self.rests.append(request)
        num_chunks = 0
        async with aclosing(self._engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk
                num_chunks += 1
                if num_chunks == self._num_chunks and request.delivered is None:
                    self.has_paused = True
                    await asyncio.Event().wait()


class Replica:
    """A model service whose end can be chosen. `hangs_s`: how long Serve leaves it running when it hangs."""

    def __init__(self, service: ModelService, engine: Any, hangs_s: float = HANGS_S) -> None:
        self.service = service
        self.engine = engine
        self._hangs_s = hangs_s
        self._is_closing = asyncio.Event()
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
        self._is_closing.set()
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
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_closing.wait(), self._hangs_s)
        await self._kill()

    async def _drain(self) -> None:
        await self.service.stop(drain_s=_DRAIN_S)


async def kill_the_paused(running: Running, engines: Sequence[PausingEngine]) -> None:
    """When one of the engines, which the running services serve in this order, pauses in an answer."""
    await wait_until(lambda: any(engine.has_paused for engine in engines))
    number = next(number for number, engine in enumerate(engines) if engine.has_paused)
    replica = Replica(running.services[number], engines[number])
    await replica.end("kill")
    await replica.close()


class Fleet:
    """The replicas of one model behind a running endpoint."""

    def __init__(self, running: Running, *, pace_s: float, num_slots: int = 1000, hangs_s: float = HANGS_S) -> None:
        self._running = running
        self._pace_s = pace_s
        self._num_slots = num_slots
        self._hangs_s = hangs_s
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
        self.alive.append(Replica(service, engine, self._hangs_s))
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
