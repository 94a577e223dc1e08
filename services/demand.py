"""What waits at the endpoints: each announces it in Ray's key-value store, the scaling of each model adds it up.

A record is renewed every second and at once when a request begins to wait for a model that has no replica. Readers
treat a record that did not change for some seconds of their own clock as gone, as with the records of replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from cluster.autoscaling import Waiting
from services.discovery import BEAT_S, DEAD_AFTER_S, FORGET_AFTER_S, BeatStore

DEMAND_PREFIX = "windfarm-demand/"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """One endpoint's view of one model. Tokens are estimates; `first_tokens` has pairs of age and time, in seconds."""

    num_waiting: int = 0
    waiting_tokens: float = 0.0
    num_begun: int = 0
    begun_tokens: float = 0.0
    seconds_per_token: float | None = None
    first_tokens: Sequence[tuple[float, float]] = ()


def encode_demand(beat: int, models: Mapping[str, ModelDemand]) -> bytes:
    return json.dumps({"beat": beat, "models": {name: asdict(each) for name, each in models.items()}}).encode()


def decode_demand(value: bytes) -> tuple[int, dict[str, ModelDemand]]:
    """Beat and models; `ValueError` when it is no such record (written by other code, for example)."""
    try:
        record = json.loads(value)
        return int(record["beat"]), {name: ModelDemand(**each) for name, each in record["models"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"Not an endpoint's record: {error}") from error


def add_up(demands: Iterable[ModelDemand], *, within_s: float, begun_within_s: float) -> Waiting:
    """What several endpoints know of one model. First tokens count that came in the last `within_s` seconds, of
    requests that came in the last `begun_within_s`."""
    found = list(demands)
    speeds = [each.seconds_per_token for each in found if each.seconds_per_token is not None]
    return Waiting(
        num_requests=sum(each.num_waiting for each in found),
        num_tokens=sum(each.waiting_tokens for each in found),
        num_begun=sum(each.num_begun for each in found),
        begun_tokens=sum(each.begun_tokens for each in found),
        seconds_per_token=sum(speeds) / len(speeds) if speeds else None,
        first_token_s=[
            seconds
            for each in found
            for age_s, seconds in each.first_tokens
            if age_s < within_s and age_s + seconds < begun_within_s
        ],
    )


class DemandBeacon:
    """Announces what `read` tells until it is stopped."""

    def __init__(self, store: BeatStore, endpoint_id: str, read: Callable[[], Mapping[str, ModelDemand]]) -> None:
        self._store = store
        self._key = f"{DEMAND_PREFIX}{endpoint_id}"
        self._read = read
        self._beat = 0
        self._lock = asyncio.Lock()
        self._is_urgent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Announce once, then every second in the background."""
        await self._announce()
        self._task = asyncio.create_task(self._announce_for_ever(), name="demand")

    async def stop(self) -> None:
        """Stop announcing and delete the record. Safe to call twice."""
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        async with self._lock:
            await asyncio.to_thread(self._store.delete, self._key)

    def hurry(self) -> None:
        """Announce now: somebody waits for a model that has to be started."""
        self._is_urgent.set()

    async def _announce(self) -> None:
        async with self._lock:
            self._beat += 1
            await asyncio.to_thread(self._store.put, self._key, encode_demand(self._beat, self._read()))

    async def _announce_for_ever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_urgent.wait(), BEAT_S)
            self._is_urgent.clear()
            try:
                await self._announce()
            except Exception as error:  # noqa: BLE001  # Ray's store fails in many ways while its head is away
                _log.warning("Could not announce what waits: %s. Trying again.", error)


class DemandReader:
    """The records of all endpoints that are alive, by a clock of one's own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[int, float, dict[str, ModelDemand]]] = {}

    def take(self, values: Mapping[str, bytes]) -> list[str]:
        """Bring the picture up to date with what the store has now; returns the keys that nobody renews any more."""
        now = self._clock()
        for key in self._seen.keys() - values.keys():
            del self._seen[key]
        for key, value in values.items():
            try:
                beat, models = decode_demand(value)
            except ValueError as error:
                _log.warning("Ignoring %s: %s", key, error)
                continue
            before = self._seen.get(key)
            if before is None or before[0] != beat:
                self._seen[key] = (beat, now, models)
        return [key for key, (_, changed_at, _) in self._seen.items() if now - changed_at > FORGET_AFTER_S]

    @property
    def has_endpoint(self) -> bool:
        """Whether any endpoint tells what waits."""
        return bool(self._alive())

    def of(self, model: str, *, within_s: float, begun_within_s: float) -> Waiting:
        """What all endpoints together know of the model; see `add_up`."""
        mine = [models[model] for models in self._alive() if model in models]
        return add_up(mine, within_s=within_s, begun_within_s=begun_within_s)

    def _alive(self) -> list[dict[str, ModelDemand]]:
        now = self._clock()
        return [models for _, changed_at, models in self._seen.values() if now - changed_at < DEAD_AFTER_S]
