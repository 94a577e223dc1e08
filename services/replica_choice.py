"""Which replica gets a request: the one that has computed most of its prompt, unless it is overloaded; otherwise the
less busy of two random ones. Pure; it knows what it sent where, and asks no engine.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.prompt_prefix import Fingerprint

BLOCKS_PER_REPLICA = 16_384
"""Remembered for each replica, the latest ones: 8 MiB of prompts."""
MIN_CACHED_BYTES = 256
"""A shorter common beginning is not worth a busier replica."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that takes requests. `load` counts requests that run or wait there, `num_slots` how many can run."""

    replica_id: str
    load: int
    num_slots: int


class ReplicaChoice:
    """For one event loop. One endpoint's own picture: what others send is seen in the load alone."""

    def __init__(self, draw: random.Random | None = None) -> None:
        self._draw = draw or random.Random()
        self._seen: dict[str, OrderedDict[bytes, None]] = {}

    def choose(self, candidates: Sequence[Candidate], prompt: Fingerprint) -> Candidate:
        """One of the candidates, of which there is at least one."""
        if len(candidates) == 1:
            return candidates[0]
        if prompt:
            cached = {each.replica_id: self.num_cached_bytes(each.replica_id, prompt) for each in candidates}
            longest = max(cached.values())
            if longest >= MIN_CACHED_BYTES:
                best = min((c for c in candidates if cached[c.replica_id] == longest), key=_fullness)
                if not _is_overloaded(best, candidates):
                    return best
        return min(self._draw.sample(list(candidates), 2), key=_fullness)

    def note(self, replica_id: str, prompt: Fingerprint) -> None:
        """The replica computes this prompt now."""
        seen = self._seen.setdefault(replica_id, OrderedDict())
        # The last block first: the beginning of a prompt is what others share, and is forgotten last.
        for block in reversed(prompt):
            seen[block.hash] = None
            seen.move_to_end(block.hash)
        while len(seen) > BLOCKS_PER_REPLICA:
            seen.popitem(last=False)

    def num_cached_bytes(self, replica_id: str, prompt: Fingerprint) -> int:
        """How much of the prompt's beginning was sent to this replica before."""
        seen = self._seen.get(replica_id)
        num_bytes = 0
        if seen is not None:
            for block in prompt:
                if block.hash not in seen:
                    break
                num_bytes += block.num_bytes
        return num_bytes

    @property
    def num_replicas(self) -> int:
        """Of which something is remembered."""
        return len(self._seen)

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """Replicas that are gone; their successors begin with nothing."""
        for replica_id in [replica_id for replica_id in self._seen if is_gone(replica_id)]:
            del self._seen[replica_id]


def _fullness(candidate: Candidate) -> float:
    return candidate.load / candidate.num_slots


def _is_overloaded(candidate: Candidate, candidates: Sequence[Candidate]) -> bool:
    """It would let the request wait while another has room, or wait much longer than where the queue is shortest."""
    if candidate.load < candidate.num_slots:
        return False
    shortest = min(candidates, key=_fullness)
    return shortest.load < shortest.num_slots or _fullness(candidate) > _fullness(shortest) + 1
