"""Who serves what, and where: replicas announce themselves, readers keep a directory.

Each replica puts a small JSON record (a beat) into Ray's internal key-value store every second and deletes it when it
stops. A reader treats a record whose beat number did not change for five seconds of its own clock as dead. Ray's
key-value store is private API: `RayBeatStore` alone touches it (contract test on the pinned Ray).
"""

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
from typing import Any, Literal, Protocol

from cluster.engine import EngineLoad

BEAT_S = 1.0
DEAD_AFTER_S = 5.0
FORGET_AFTER_S = 60.0

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


class BeatStore(Protocol):
    """A shared key-value store. All methods block; they are called from threads."""

    def put(self, key: str, value: bytes) -> None: ...

    def delete(self, key: str) -> None: ...

    def read_all(self, prefix: str) -> dict[str, bytes]: ...


class RayBeatStore:
    """Ray's internal key-value store, from any process that is connected to Ray."""

    NAMESPACE = b"windfarm"

    def put(self, key: str, value: bytes) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=self.NAMESPACE)

    def delete(self, key: str) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_del(key, namespace=self.NAMESPACE)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        from ray.experimental import internal_kv

        if not (keys := internal_kv._internal_kv_list(prefix, namespace=self.NAMESPACE)):
            return {}
        client = internal_kv.internal_kv_get_gcs_client()
        values = client.internal_kv_multi_get(keys, self.NAMESPACE)  # one call for all of them; what has gone is absent
        return {key.decode(): value for key, value in values.items()}


class Beacon:
    """Announces one replica until it is stopped.

    `load` tells what runs and waits there at the moment of each beat.
    """

    def __init__(
        self, store: BeatStore, endpoint: ReplicaEndpoint, load: Callable[[], EngineLoad] = lambda: EngineLoad(0, 0)
    ) -> None:
        self._store = store
        self._endpoint = endpoint
        self._load = load
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    @property
    def endpoint(self) -> ReplicaEndpoint:
        return self._endpoint

    async def start(self) -> None:
        """Announce once, then every second in the background."""
        await self._beat()
        self._task = asyncio.create_task(self._beat_for_ever(), name=f"beacon {self._endpoint.key}")

    async def set_state(self, state: ReplicaState) -> None:
        """Change the state and announce it at once."""
        self._endpoint = replace(self._endpoint, state=state)
        await self._beat()

    async def stop(self) -> None:
        """Stop announcing and delete the record. Safe to call twice."""
        if self._task is None:
            return
        task, self._task = self._task, None
        await _cancel(task)
        async with self._lock:
            await asyncio.to_thread(self._store.delete, self._endpoint.key)

    async def _beat(self) -> None:
        async with self._lock:
            load = self._load()
            self._endpoint = replace(
                self._endpoint,
                running=load.num_running,
                queued=load.num_queued,
                num_tokens=load.num_tokens,
                max_tokens=load.max_tokens,
                beat=self._endpoint.beat + 1,
            )
            await asyncio.to_thread(self._store.put, self._endpoint.key, encode_beat(self._endpoint))

    async def _beat_for_ever(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self._beat()
            except Exception as error:  # noqa: BLE001  # Ray's store fails in many ways while its head is away
                _log.warning("Could not announce %s: %s. Trying again.", self._endpoint.key, error)


@dataclass(slots=True)
class _Entry:
    endpoint: ReplicaEndpoint
    changed_at: float
    failed_beat: int | None = None


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
        self._entries: dict[str, _Entry] = {}
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
            await _cancel(task)

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
        now = self._clock()
        return any(
            entry.endpoint.replica_id == replica_id and now - entry.changed_at < DEAD_AFTER_S
            for entry in self._entries.values()
        )

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
        for entry in self._entries.values():
            if entry.endpoint.replica_id == replica_id:
                entry.failed_beat = entry.endpoint.beat
        self._view = None

    async def refresh(self) -> None:
        """Read the store now."""
        values = await asyncio.to_thread(self._store.read_all, BEATS_PREFIX)
        forgotten = self.take(values)
        for key in forgotten:  # left behind by a killed replica; a live one would write it again within a second
            await asyncio.to_thread(self._store.delete, key)

    def take(self, values: Mapping[str, bytes]) -> list[str]:
        """Bring the entries up to date with what the store has; returns the keys that nobody beats any more."""
        now, self._view = self._clock(), None
        for key in self._entries.keys() - values.keys():
            del self._entries[key]
        for key, value in values.items():
            try:
                endpoint = decode_beat(value)
            except ValueError as error:
                _log.warning("Ignoring %s: %s", key, error)
                continue
            entry = self._entries.get(key)
            if entry is None:
                self._entries[key] = _Entry(endpoint, now)
            elif entry.endpoint.beat != endpoint.beat:
                entry.endpoint, entry.changed_at = endpoint, now
        self._there_at |= dict.fromkeys(self.models(), now)
        return [key for key, entry in self._entries.items() if now - entry.changed_at > FORGET_AFTER_S]

    def _look(self) -> _View:
        now = self._clock()
        if self._view is None or now >= self._view.until:
            self._view = self._view_at(now)
        return self._view

    def _view_at(self, now: float) -> _View:
        alive = [
            entry
            for _, entry in sorted(self._entries.items())
            if now - entry.changed_at < DEAD_AFTER_S and entry.failed_beat != entry.endpoint.beat
        ]
        ready = [e.endpoint for e in alive if e.endpoint.model is not None and e.endpoint.state == "ready"]
        present = Counter((e.model, e.gang) for e in ready)
        replicas: dict[str, list[ReplicaEndpoint]] = {}
        for endpoint in ready:
            if not endpoint.gang or present[endpoint.model, endpoint.gang] == endpoint.gang_size:
                replicas.setdefault(str(endpoint.model), []).append(endpoint)
        until = min((entry.changed_at + DEAD_AFTER_S for entry in alive), default=math.inf)
        return _View([entry.endpoint for entry in alive], replicas, until)

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001  # Ray's store fails in many ways while its head is away
                _log.warning("Could not read who serves what: %s. Trying again.", error)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
