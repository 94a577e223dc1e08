"""The endpoint's own book on the replicas of all models: what is under way at each, what hung, which prompts it got.

Used from one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.discovery import ReplicaEndpoint
from services.prompt_prefix import Block, Fingerprint, blocks_of
from services.replica_choice import Candidate, ReplicaChoice

# Hashed before others have their turn. It takes about as long as handing work to a thread does, and a thread would keep
# the loop waiting for the interpreter's lock: hashes of so few bytes are computed under it.
_BLOCKS_PER_TURN = 32
_SHUNNED_S = 30.0
_REMEMBERED_REPLICAS = 64


class ReplicaPicker:
    """`is_alive` tells of a replica id whether it announced itself lately."""

    def __init__(self, is_alive: Callable[[str], bool], choice: ReplicaChoice | None = None) -> None:
        self.choice = choice or ReplicaChoice()
        self._is_alive = is_alive
        self._in_flight: Counter[str] = Counter()
        self._shunned: dict[str, float] = {}
        """Replicas that hung, and until when others go first."""

    async def fingerprint(self, body: Mapping[str, Any], num_replicas: int) -> Fingerprint:
        """Nothing where there is no choice. Long prompts are hashed in many short turns of the event loop."""
        if num_replicas < 2:
            return ()
        blocks: list[Block] = []
        for block in blocks_of(body):
            blocks.append(block)
            if len(blocks) % _BLOCKS_PER_TURN == 0:
                await asyncio.sleep(0)
        return tuple(blocks)

    def pick(self, replicas: Sequence[ReplicaEndpoint], prompt: Fingerprint) -> ReplicaEndpoint:
        """One of the replicas, of which there is at least one. Those that hung lately are a last resort."""
        now = time.monotonic()
        well = [replica for replica in replicas if self._shunned.get(replica.replica_id, 0.0) < now] or replicas
        by_id = {replica.replica_id: replica for replica in well}
        candidates = [
            Candidate(replica_id, self._load(replica), max(1, int(replica.info.get("max_concurrency", 1))))
            for replica_id, replica in by_id.items()
        ]
        return by_id[self.choice.choose(candidates, prompt).replica_id]

    def enter(self, replica_id: str, prompt: Fingerprint) -> None:
        """A request goes there now; it counts until `leave`."""
        self._in_flight[replica_id] += 1
        if prompt:
            self.choice.note(replica_id, prompt)
            if self.choice.num_replicas > _REMEMBERED_REPLICAS:
                self.choice.forget(lambda other: not self._is_alive(other))

    def leave(self, replica_id: str) -> None:
        self._in_flight[replica_id] -= 1
        if self._in_flight[replica_id] <= 0:
            del self._in_flight[replica_id]

    def shun(self, replica_id: str) -> None:
        """It hung, and goes on to announce itself."""
        now = time.monotonic()
        self._shunned = {each: until for each, until in self._shunned.items() if until > now}
        self._shunned[replica_id] = now + _SHUNNED_S

    def _load(self, replica: ReplicaEndpoint) -> int:
        # The beat counts everybody's requests but is up to a second old; our own count is exact.
        return max(self._in_flight[replica.replica_id], replica.running + replica.queued)
