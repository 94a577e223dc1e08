"""What became of every gang: which ranks it has and where, what it lost, and how long until its model served again.

The conductor looks twice a second. That a rank is lost is known from the word that the other ranks leave behind, and
where none of them could, from the silence of all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from services.beats import BeatStore, Record, Records
from services.discovery import BEATS_PREFIX, ReplicaEndpoint, read_beat
from services.gang_loss import Loss, read_losses

LOOK_EVERY_S = 0.5
_KEPT_RESTARTS = 20
# Within this time after a change of its configuration Serve ends an application's old gangs.
_CHANGE_S = 60.0
_log = logging.getLogger("windfarm.gangs")


@dataclass(frozen=True, slots=True)
class Restart:
    """That a gang was lost and another one took its place. Times in seconds since the epoch."""

    app: str
    lost_gang: str
    gang: str
    rank: int
    reason: str
    lost_at: float
    seconds: float
    """From the loss until the new gang could serve."""


class GangTracker:
    """`look` blocks on the store and is called by one thread; `summary` may be called by any."""

    def __init__(self, store: BeatStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._records = Records(read_beat, clock)
        self._complete: dict[str, str] = {}
        """Application of each gang that serves."""
        self._pending: dict[str, Loss] = {}
        """Losses by gang that no other gang has replaced yet."""
        self._expected: dict[str, float] = {}
        """Until when an application may lose gangs on purpose."""
        self._restarts: list[Restart] = []

    def expect_change(self, app: str) -> None:
        """The gangs of this application are about to be replaced on purpose, which is no loss."""
        self._expected[app] = self._clock() + _CHANGE_S

    def run(self, should_end: threading.Event) -> None:
        """Look until the end; Ray's store fails in many ways while it starts and stops."""
        while not should_end.wait(LOOK_EVERY_S):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001
                _log.warning("Could not look at the gangs: %s. Trying again.", error)

    def look(self) -> None:
        """Bring the picture up to date, and log what was lost and what serves again."""
        now = self._clock()
        self._records.take(self._store.read_all(BEATS_PREFIX))
        complete = dict(self._complete_gangs())
        for loss in read_losses(self._store):
            self._store.delete(loss.key)
            self._note_loss(loss)
        for gang, app in self._complete.items():
            if gang not in complete and self._is_silent(gang):
                self._note_loss(Loss(app, gang, 0, "all of its ranks are silent", self._last_sign(gang)))
        for gang, app in complete.items():
            if gang not in self._complete:
                self._note_start(gang, app, now)
        self._complete = complete

    def summary(self) -> dict[str, Any]:
        """By application: its gangs with their ranks, and the latest restarts."""
        found: dict[str, Any] = {}
        for end in sorted((record.told for record in self._ranks()), key=lambda end: (end.gang, end.rank)):
            gangs = found.setdefault(end.app, {"gangs": {}, "restarts": []})["gangs"]
            gang = gangs.setdefault(
                end.gang, {"size": end.gang_size, "is_complete": end.gang in self._complete, "ranks": []}
            )
            host = urlsplit(end.url).hostname
            gang["ranks"].append({"rank": end.rank, "node": host, "pid": end.pid, "running": end.running})
        for restart in self._restarts:
            found.setdefault(restart.app, {"gangs": {}, "restarts": []})["restarts"].append(asdict(restart))
        return found

    def _ranks(self) -> list[Record[ReplicaEndpoint]]:
        """Of all gangs, also of those that were killed and left their records behind."""
        return [record for record in list(self._records.by_key.values()) if record.told.gang]

    def _complete_gangs(self) -> list[tuple[str, str]]:
        members: dict[str, list[ReplicaEndpoint]] = {}
        for _, record in self._records.alive():
            if record.told.gang and record.told.state == "ready":
                members.setdefault(record.told.gang, []).append(record.told)
        return [(gang, ends[0].app) for gang, ends in members.items() if len(ends) == ends[0].gang_size]

    def _is_silent(self, gang: str) -> bool:
        """Whether records are left that nobody renews: an orderly stop takes them away."""
        return any(record.told.gang == gang and record.told.state == "ready" for record in self._ranks())

    def _last_sign(self, gang: str) -> float:
        return max(record.changed_at for record in self._ranks() if record.told.gang == gang)

    def _note_loss(self, loss: Loss) -> None:
        if loss.at < self._expected.get(loss.app, 0.0):
            return
        known = self._pending.get(loss.gang)
        if known is not None and known.is_guess and not loss.is_guess:
            self._pending[loss.gang] = replace(loss, at=known.at)
        elif known is None:  # the others of the gang report the same
            self._pending[loss.gang] = loss
            _log.error("%s: gang %s lost rank %d: %s", loss.app, loss.gang, loss.rank, loss.reason)

    def _note_start(self, gang: str, app: str, now: float) -> None:
        self._expected.pop(app, None)
        losses = sorted((loss for loss in self._pending.values() if loss.app == app), key=lambda loss: loss.at)
        if not losses:
            _log.info("%s: gang %s serves", app, gang)
            return
        loss = self._pending.pop(losses[0].gang)
        restart = Restart(app, loss.gang, gang, loss.rank, loss.reason, loss.at, round(now - loss.at, 3))
        self._restarts = [*self._restarts, restart][-_KEPT_RESTARTS:]
        _log.info("%s: gang %s serves in place of %s, %.1f s after its loss", app, gang, loss.gang, restart.seconds)
