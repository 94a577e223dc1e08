"""Who serves what, and where: replicas announce themselves by records that they renew, readers keep a directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cluster.engine import EngineLoad
from services.beats import BEAT_S, DEAD_AFTER_S, Announcer, BeatStore, Records

BEATS_PREFIX = "windfarm/"
RELAY_APP = "relay"
"""The application under which the processes of the public endpoint announce themselves."""
_log = logging.getLogger(__name__)

ReplicaState = Literal["ready", "draining"]


@dataclass(frozen=True, slots=True)
class ReplicaEndpoint:
    """One replica as it announced itself. `info` says what it serves (for a model: the fields of `ModelInfo`)."""

    replica_id: str
    app: str
    url: str
    pid: int
    model: str | None = None
    state: ReplicaState = "ready"
    running: int = 0
    queued: int = 0
    num_tokens: int = 0
    """Tokens that running requests hold in the KV cache, of `max_tokens`; 0 and 0: not known."""
    max_tokens: int = 0
    beat: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)
    gang: str = ""
    """Id of the gang whose rank this replica is; empty: it holds a whole model."""
    rank: int = 0
    gang_size: int = 1

    @property
    def key(self) -> str:
        return f"{BEATS_PREFIX}{self.app}/{self.replica_id}"


def encode_beat(endpoint: ReplicaEndpoint) -> bytes:
    return json.dumps(asdict(endpoint), separators=(",", ":")).encode()


def decode_beat(value: bytes) -> ReplicaEndpoint:
    """The record in `value`; `ValueError` when it is none (written by other code, for example)."""
    try:
        return ReplicaEndpoint(**json.loads(value))
    except TypeError as error:
        raise ValueError(f"Not a replica's record: {error}") from error


def read_beat(value: bytes) -> tuple[int, ReplicaEndpoint]:
    """The number of the beat and the record; `ValueError` when it is none."""
    endpoint = decode_beat(value)
    return endpoint.beat, endpoint


class Beacon:
    """Announces one replica until it is stopped.

    `load` tells what runs and waits there at the moment of each beat.
    """

    def __init__(
        self, store: BeatStore, endpoint: ReplicaEndpoint, load: Callable[[], EngineLoad] = lambda: EngineLoad(0, 0)
    ) -> None:
        self._endpoint = endpoint
        self._load = load
        self._announcer = Announcer(store, endpoint.key, self._write)

    @property
    def endpoint(self) -> ReplicaEndpoint:
        return self._endpoint

    async def start(self) -> None:
        """Announce once, then every second in the background."""
        await self._announcer.start()

    async def set_state(self, state: ReplicaState) -> None:
        """Change the state and announce it at once."""
        self._endpoint = replace(self._endpoint, state=state)
        await self._announcer.announce()

    async def stop(self) -> None:
        """Stop announcing and delete the record. Safe to call twice."""
        await self._announcer.stop()

    def _write(self, beat: int) -> bytes:
        load = self._load()
        self._endpoint = replace(
            self._endpoint,
            running=load.num_running,
            queued=load.num_queued,
            num_tokens=load.num_tokens,
            max_tokens=load.max_tokens,
            beat=beat,
        )
        return encode_beat(self._endpoint)


@dataclass(frozen=True, slots=True)
class _View:
    """What holds until something changes or `until`, when the next endpoint counts as dead. It is asked several times
    for each request."""

    endpoints: Sequence[ReplicaEndpoint]
    replicas: Mapping[str, Sequence[ReplicaEndpoint]]
    until: float


class Directory:
    """What all replicas announced, kept fresh in the background; asking it never blocks."""

    def __init__(self, store: BeatStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._records = Records(read_beat, clock)
        self._failed: dict[str, int] = {}
        """Beat of each record after which a connection to its replica failed."""
        self._view: _View | None = None
        self._there_at: dict[str, float] = {}
        """When each model was last seen with a replica."""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read once, then every second in the background."""
        await self.refresh()
        self._task = asyncio.create_task(self._refresh_for_ever(), name="directory")

    async def stop(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def endpoints(self, app: str | None = None) -> list[ReplicaEndpoint]:
        """All live endpoints (of one application), draining ones included, in a stable order."""
        endpoints = self._look().endpoints
        return [endpoint for endpoint in endpoints if app is None or endpoint.app == app]

    def replicas(self, model: str) -> list[ReplicaEndpoint]:
        """Live replicas of a model that take requests. A rank does only while its whole gang is there: the others
        cannot generate without the one that is missing."""
        return list(self._look().replicas.get(model, ()))

    def is_alive(self, replica_id: str) -> bool:
        """Whether this replica announced itself lately: draining or not, and whatever failed with it since."""
        return any(record.told.replica_id == replica_id for _, record in self._records.alive())

    def models(self) -> list[str]:
        """Names of all models that have a live replica."""
        return sorted(self._look().replicas)

    def seconds_away(self, model: str) -> float | None:
        """For how long no replica of the model has been there; 0: one is; none: nobody has seen one here."""
        if self.replicas(model):
            return 0.0
        there_at = self._there_at.get(model)
        return None if there_at is None else self._clock() - there_at

    def report_failure(self, replica_id: str) -> None:
        """A connection to this replica failed: leave it out until it beats again."""
        for key, record in self._records.by_key.items():
            if record.told.replica_id == replica_id:
                self._failed[key] = record.beat
        self._view = None

    async def refresh(self) -> None:
        """Read the store now."""
        values = await asyncio.to_thread(self._store.read_all, BEATS_PREFIX)
        forgotten = self.take(values)
        for key in forgotten:  # left behind by a killed replica; a live one would write it again within a second
            await asyncio.to_thread(self._store.delete, key)

    def take(self, values: Mapping[str, bytes]) -> list[str]:
        """Bring the entries up to date with what the store has; returns the keys that nobody beats any more."""
        forgotten = self._records.take(values)
        self._failed = {key: beat for key, beat in self._failed.items() if key in self._records.by_key}
        self._view = None
        self._there_at |= dict.fromkeys(self.models(), self._clock())
        return forgotten

    def _look(self) -> _View:
        now = self._clock()
        if self._view is None or now >= self._view.until:
            self._view = self._view_now()
        return self._view

    def _view_now(self) -> _View:
        alive = [record for key, record in self._records.alive() if self._failed.get(key) != record.beat]
        told = [record.told for record in alive]
        ready = [endpoint for endpoint in told if endpoint.model is not None and endpoint.state == "ready"]
        present = Counter((endpoint.model, endpoint.gang) for endpoint in ready)
        replicas: dict[str, list[ReplicaEndpoint]] = {}
        for endpoint in ready:
            if not endpoint.gang or present[endpoint.model, endpoint.gang] == endpoint.gang_size:
                replicas.setdefault(str(endpoint.model), []).append(endpoint)
        until = min((record.changed_at + DEAD_AFTER_S for record in alive), default=math.inf)
        return _View(told, replicas, until)

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001  # Ray's store fails in many ways while its head is away
                _log.warning("Could not read who serves what: %s. Trying again.", error)
