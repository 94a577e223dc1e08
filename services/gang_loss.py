"""The loss of a rank: the error that ends its gang's streams, and the word that is left for whoever reports it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass

from cluster.errors import EngineDead
from services.beats import BeatStore

GANG_LOST = "gang_lost"
"""Code of the error that clients get."""
LOSSES_PREFIX = "gang-loss/"


@dataclass(frozen=True, slots=True)
class Loss:
    """That a gang lost a rank. `at` is in seconds since the epoch."""

    app: str
    gang: str
    rank: int
    reason: str
    at: float
    is_guess: bool = False
    """That its own engine ended is all that a rank knows yet: another rank may be the cause."""

    @property
    def key(self) -> str:
        return f"{LOSSES_PREFIX}{self.app}/{self.gang}"

    @property
    def sentence(self) -> str:
        return (
            f"The model lost rank {self.rank} of its gang {self.gang} in the middle of this answer ({self.reason}); "
            "the gang restarts as a whole. What came so far is incomplete; ask again."
        )


class GangLost(EngineDead):
    """A rank of this replica's gang is gone, so no rank of it can generate any more."""

    code = GANG_LOST


async def record_loss(store: BeatStore, loss: Loss) -> None:
    """Leave word of a loss for whoever reports how long the gang was away."""
    await asyncio.to_thread(store.put, loss.key, json.dumps(asdict(loss)).encode())


def read_losses(store: BeatStore) -> list[Loss]:
    return [Loss(**json.loads(value)) for value in store.read_all(LOSSES_PREFIX).values()]
