"""The one place that counts the limited keys of all relays. Relays tell it what began and ended; it decides. No I/O.

Every relay keeps a journal of its own requests (running, or ended within the last 60 seconds) and sends what changed.
That makes this book a sum that can be lost: a new one has another `epoch`, answers no question for `recovery_s`, and is
told the whole journal by every relay meanwhile. (What a relay loses together with the book is forgotten.) A relay that
falls silent for `LEASE_S` is taken for dead: its running requests give their places back and are booked with all that
they had reserved, because nobody knows what they used.

Times travel as ages, so clocks of different machines never meet. The book's own clock is monotonic: a change of the
time of day does nothing. After a pause of this whole process (a suspended machine) every relay looks silent; therefore
time in which nobody was heard counts for `MAX_SILENCE_STEP_S` at most.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.limits import KeyUsage, Lease, Limits, Refusal, Standing

LEASE_S = 15.0
MAX_SILENCE_STEP_S = 5.0
RECOVERY_S = 5.0
"""Longer than a relay takes to notice a new book: it says something every second while it has anything to tell, and
gives up on an answer that does not come after three."""
_SWEEP_S = 10.0


@dataclass(frozen=True, slots=True)
class Ask:
    """May this request begin? `tokens`: what it may use at most."""

    lease_id: str
    key_id: str
    limits: Limits
    tokens: int


@dataclass(frozen=True, slots=True)
class Record:
    """One request of a relay's journal; ages in seconds before the message was sent. `ended_age_s` None: it runs."""

    lease_id: str
    key_id: str
    tokens: int
    age_s: float
    ended_age_s: float | None


@dataclass(frozen=True, slots=True)
class Message:
    """What a relay says. `number` grows with each message of a relay; `is_whole`: the records are its whole journal."""

    relay: str
    number: int
    epoch: str
    is_whole: bool
    records: Sequence[Record]
    asks: Sequence[Ask]


@dataclass(frozen=True, slots=True)
class Verdict:
    refusal: Refusal | None
    standing: Standing


@dataclass(frozen=True, slots=True)
class Reply:
    """`verdicts` in the order of the asks. None: nothing was done, tell the whole journal first. `recovering_s`: the
    book is new and decides nothing for so many seconds (the records were taken)."""

    epoch: str
    verdicts: Sequence[Verdict] | None
    recovering_s: float = 0.0


class _Relay:
    def __init__(self) -> None:
        self.number = -1
        self.heard_at = 0.0
        self.running: dict[str, str] = {}
        """Lease to key."""


class LimitBook:
    """`exchange` is one step: it never waits, so messages of any number of relays are decided one after the other."""

    def __init__(self, *, recovery_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.epoch = secrets.token_hex(8)
        self._clock = clock
        self._now = clock()
        self._decides_at = self._now + recovery_s
        self._heard_time = 0.0  # as `_now`, without the time in which nobody was heard
        self._swept_at = self._now
        self._keys: dict[str, KeyUsage] = {}
        self._relays: dict[str, _Relay] = {}

    @property
    def num_keys(self) -> int:
        return len(self._keys)

    def exchange(self, message: Message) -> Reply:
        """Take a relay's records, then decide on its asks."""
        self._advance()
        if not message.is_whole and (message.epoch != self.epoch or message.relay not in self._relays):
            return Reply(self.epoch, None)  # a new book, or a relay that was taken for dead
        relay = self._relays.setdefault(message.relay, _Relay())
        if message.number <= relay.number:  # overtaken: the relay gave up on it long ago
            return Reply(self.epoch, None)
        relay.number, relay.heard_at = message.number, self._heard_time
        self._expire_silent_relays()
        if message.is_whole:
            self._drop_others(relay, message.records)
        for record in message.records:
            self._take(relay, record)
        if not message.asks:
            return Reply(self.epoch, ())
        if self._now < self._decides_at:
            return Reply(self.epoch, (), self._decides_at - self._now)
        return Reply(self.epoch, [self._decide(relay, ask) for ask in message.asks])

    def _advance(self) -> None:
        now = max(self._now, self._clock())
        self._heard_time += min(now - self._now, MAX_SILENCE_STEP_S)
        self._now = now
        if now - self._swept_at >= _SWEEP_S:
            self._swept_at = now
            self._keys = {key: usage for key, usage in self._keys.items() if not usage.is_idle(now)}

    def _take(self, relay: _Relay, record: Record) -> None:
        ended_at = None if record.ended_age_s is None else self._now - record.ended_age_s
        self._usage(record.key_id).put(
            record.lease_id, Lease(self._now - record.age_s, record.tokens, ended_at), self._now
        )
        if ended_at is None:
            relay.running[record.lease_id] = record.key_id
        else:
            relay.running.pop(record.lease_id, None)

    def _decide(self, relay: _Relay, ask: Ask) -> Verdict:
        usage = self._usage(ask.key_id)
        refusal = usage.admit(ask.lease_id, ask.limits, ask.tokens, self._now)
        if refusal is None:
            relay.running[ask.lease_id] = ask.key_id
        return Verdict(refusal, usage.standing(ask.limits, self._now))

    def _drop_others(self, relay: _Relay, records: Sequence[Record]) -> None:
        """A relay that tells everything does not know the rest: its clients were answered without a decision."""
        told = {record.lease_id for record in records}
        for lease_id, key_id in list(relay.running.items()):
            if lease_id not in told:
                self._usage(key_id).drop(lease_id)
                del relay.running[lease_id]

    def _expire_silent_relays(self) -> None:
        for name, relay in list(self._relays.items()):
            if self._heard_time - relay.heard_at <= LEASE_S:
                continue
            for lease_id, key_id in relay.running.items():
                usage = self._usage(key_id)
                lease = usage.lease(lease_id)
                assert lease is not None, "running leases are never forgotten"
                usage.put(lease_id, Lease(lease.admitted_at, lease.tokens, self._now), self._now)
            del self._relays[name]

    def _usage(self, key_id: str) -> KeyUsage:
        usage = self._keys.get(key_id)
        if usage is None:
            usage = self._keys[key_id] = KeyUsage()
        return usage
