"""A bounded waiting room in front of a model that is fair between keys and orders priorities. Pure: no clock, no loop.

Among the keys that wait, the one that has had the least service is next (virtual token counter: Sheng et al.,
"Fairness in Serving Large Language Models", OSDI 2024). A key that comes back after a pause begins at the least count
of those that are there, so nobody saves up. Where the room is full, the newest request of the key with the most waiting
gives way to a key with fewer (longest queue drop): somebody who fills the room alone cannot keep others out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Ticket:
    """One request. `cost` is what its key is charged when it begins, in tokens; `called` hears that it may begin, or
    that it gave way to another key."""

    key: str
    cost: float
    called: Callable[[bool], None]


@dataclass(slots=True)
class _Room:
    """Who waits, by key, in the order of arrival."""

    waiting: OrderedDict[str, list[Ticket]] = field(default_factory=OrderedDict)
    num_waiting: int = 0

    def add(self, ticket: Ticket) -> None:
        self.waiting.setdefault(ticket.key, []).append(ticket)
        self.num_waiting += 1

    def remove(self, ticket: Ticket) -> None:
        tickets = self.waiting[ticket.key]
        tickets.remove(ticket)
        self.num_waiting -= 1
        if not tickets:
            del self.waiting[ticket.key]


class RoomFull(Exception):
    """Nobody gave way. `is_own_doing`: this key has more than its share of the room."""

    def __init__(self, *, is_own_doing: bool, num_waiting: int) -> None:
        super().__init__(f"{num_waiting} requests wait already")
        self.is_own_doing = is_own_doing
        self.num_waiting = num_waiting


class FairQueue:
    """`limits[priority]` requests may wait, the lower number first. `num_places` may begin at once; it may change."""

    def __init__(self, limits: tuple[int, ...], num_places: int) -> None:
        self._limits = limits
        self.num_places = num_places
        self.num_running = 0
        self._rooms = tuple(_Room() for _ in limits)
        self._served: dict[str, float] = {}
        """Tokens that each key was charged, of keys that run or wait."""
        self._num_present: dict[str, int] = {}

    @property
    def num_waiting(self) -> int:
        return sum(room.num_waiting for room in self._rooms)

    @property
    def waiting_cost(self) -> float:
        """What those that wait will be charged when they begin."""
        return sum(ticket.cost for room in self._rooms for each in room.waiting.values() for ticket in each)

    def enter(self, ticket: Ticket, priority: int) -> None:
        """Wait, or begin at once (then `called` hears it before this returns). Raises `RoomFull`."""
        room = self._rooms[priority]
        if self.num_running >= self.num_places and room.num_waiting >= self._limits[priority]:
            self._make_room(room, ticket.key)
        self._arrive(ticket.key)
        room.add(ticket)
        self.call_next()

    def leave(self, ticket: Ticket, priority: int) -> None:
        """A request that waits is not wanted any more."""
        self._rooms[priority].remove(ticket)
        self._depart(ticket.key)

    def finish(self, ticket: Ticket, cost: float) -> None:
        """A request that began has ended, and `cost` is what it took in the end."""
        self.num_running -= 1
        self._served[ticket.key] += cost - ticket.cost
        self._depart(ticket.key)
        self.call_next()

    def call_next(self) -> None:
        """Let begin whoever can."""
        while self.num_running < self.num_places:
            room = next((room for room in self._rooms if room.num_waiting), None)
            if room is None:
                return
            key = min(room.waiting, key=self._served.__getitem__)  # of equals, the one that waits longest
            ticket = room.waiting[key][0]
            room.remove(ticket)
            self.num_running += 1
            self._served[key] += ticket.cost
            ticket.called(True)

    def _make_room(self, room: _Room, key: str) -> None:
        most = max(room.waiting, key=lambda other: len(room.waiting[other]), default=key)
        mine = len(room.waiting.get(key, ()))
        if most == key or len(room.waiting[most]) <= mine + 1:
            is_alone, share = len(room.waiting) == 1, room.num_waiting / max(1, len(room.waiting))
            raise RoomFull(is_own_doing=mine > 0 and (is_alone or mine > share), num_waiting=room.num_waiting)
        newest = room.waiting[most][-1]
        room.remove(newest)
        self._depart(newest.key)
        newest.called(False)

    def _arrive(self, key: str) -> None:
        if key not in self._num_present:
            least = min((self._served[other] for other in self._num_present), default=0.0)
            self._served[key] = max(self._served.get(key, 0.0), least)
            self._num_present[key] = 0
        self._num_present[key] += 1

    def _depart(self, key: str) -> None:
        self._num_present[key] -= 1
        if self._num_present[key] == 0:
            del self._num_present[key]
            if not self._num_present:
                self._served.clear()  # nobody is there to be compared with
