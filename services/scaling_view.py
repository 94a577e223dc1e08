"""What the scaling of one model sees (its replicas, what waits at the endpoints), and what it decides from that.

Runs in the loop of Serve's controller, so the store is read by a thread beside it, and a call takes the latest picture.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from cluster.autoscaling import CopyLoad, ScalingGoals, decide
from services.beats import BeatStore
from services.demand import DEMAND_PREFIX, DemandReader
from services.discovery import BEATS_PREFIX, Directory, ReplicaEndpoint
from services.model_status import MODEL_APP_PREFIX

READ_EVERY_S = 0.5
# A picture that is older says nothing of now: the number of replicas stays as it is.
_BLIND_AFTER_S = 5.0
WINDOW_S = 30.0
"""First tokens that came within this time are looked at."""

_log = logging.getLogger("ray.serve")


class ScalingView:
    """`start` runs a function beside the caller; tests run it at once."""

    def __init__(
        self,
        goals: ScalingGoals,
        app: str,
        store: BeatStore,
        *,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._goals = goals
        self._app = app
        self._store = store
        self._clock = clock
        self._start = start or _start_thread
        self._directory = Directory(store, clock=clock)
        self._demand = DemandReader(clock)
        self._forgotten: list[str] = []
        self._is_reading = False
        self._asked_at = -math.inf
        self._read_at = -math.inf
        self._fresh: tuple[dict[str, bytes], dict[str, bytes]] | None = None
        self._num_present = 0
        self._changed_at = -math.inf
        """When the number of copies that answer changed."""
        self._slots: float | None = None
        self._gang_size = 1
        self._told: tuple[int, str] | None = None

    def replicas_wanted(self, target: int, max_replicas: int) -> int:
        """How many replicas the model needs, of gangs: ranks. `target` again while nothing is known."""
        self._look()
        if self._clock() - self._read_at > _BLIND_AFTER_S or not self._demand.has_endpoint:
            return target
        copies = self._copies()
        waiting = self._demand.of(
            self._app.removeprefix(MODEL_APP_PREFIX),
            within_s=WINDOW_S,
            begun_within_s=self._clock() - self._changed_at,
        )
        size = self._gang_size
        decision = decide(
            self._goals,
            copies,
            waiting,
            target=math.ceil(target / size),
            max_copies=max(1, max_replicas // size),
            slots_before=self._slots,
        )
        self._tell(decision.num_copies * size, target, decision.reason)
        return decision.num_copies * size

    def _look(self) -> None:
        """Take what has been read, and have it read again where that is due."""
        fresh, self._fresh = self._fresh, None
        now = self._clock()
        if fresh is not None:
            self._directory.take(fresh[0])
            self._forgotten = self._demand.take(fresh[1])
            self._read_at = now
        if not self._is_reading and now - self._asked_at >= READ_EVERY_S:
            self._is_reading, self._asked_at = True, now
            self._start(self._read)

    def _read(self) -> None:
        try:
            for key in self._forgotten:  # left behind by a killed endpoint
                self._store.delete(key)
            replicas = self._store.read_all(f"{BEATS_PREFIX}{self._app}/")
            self._fresh = (replicas, self._store.read_all(DEMAND_PREFIX))
        except Exception as error:  # noqa: BLE001  # Ray's store fails in many ways while its head is away
            _log.warning("The scaling of %s could not read who serves what: %s. Trying again.", self._app, error)
        finally:
            self._is_reading = False

    def _copies(self) -> list[CopyLoad]:
        found = copies_of(self._directory.endpoints(self._app))
        present = [copy for copy in found if not copy.is_leaving]
        if len(present) != self._num_present:
            self._num_present, self._changed_at = len(present), self._clock()
        if present:
            self._slots = sum(copy.num_slots for copy in present) / len(present)
            self._gang_size = max(end.gang_size for end in self._directory.endpoints(self._app))
        return found

    def _tell(self, wanted: int, target: int, reason: str) -> None:
        if wanted == target:
            self._told = None
        elif self._told != (wanted, reason):
            self._told = (wanted, reason)
            _log.info("%s should have %d replicas instead of %d: %s.", self._app, wanted, target, reason)


def copies_of(endpoints: Sequence[ReplicaEndpoint]) -> list[CopyLoad]:
    """Replicas, and the gangs of which all ranks are there, each as one copy."""
    gangs: dict[str, list[ReplicaEndpoint]] = {}
    for end in endpoints:
        gangs.setdefault(end.gang or end.replica_id, []).append(end)
    return [_copy(ranks) for ranks in gangs.values() if len(ranks) == ranks[0].gang_size]


def _copy(ranks: Sequence[ReplicaEndpoint]) -> CopyLoad:
    return CopyLoad(
        num_requests=sum(rank.running + rank.queued for rank in ranks),
        num_slots=sum(max(1, int(rank.info.get("max_concurrency", 1))) for rank in ranks),
        num_tokens=sum(rank.num_tokens for rank in ranks),
        max_tokens=sum(rank.max_tokens for rank in ranks) if all(rank.max_tokens for rank in ranks) else 0,
        is_leaving=any(rank.state != "ready" for rank in ranks),
    )


def _start_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="scaling", daemon=True).start()
