"""What waits at the endpoints: each announces it in Ray's key-value store, the scaling of each model adds it up.

A record is renewed every second and at once when a request begins to wait for a model that has no replica.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from cluster.autoscaling import Waiting
from services.beats import Announcer, BeatStore, Records

DEMAND_PREFIX = "windfarm-demand/"


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


class DemandBeacon(Announcer):
    """Announces what `read` tells until it is stopped."""

    def __init__(self, store: BeatStore, endpoint_id: str, read: Callable[[], Mapping[str, ModelDemand]]) -> None:
        super().__init__(store, f"{DEMAND_PREFIX}{endpoint_id}", lambda beat: encode_demand(beat, read()))


class DemandReader:
    """The records of all endpoints that are alive, by a clock of one's own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._records = Records(decode_demand, clock)

    def take(self, values: Mapping[str, bytes]) -> list[str]:
        """Bring the picture up to date with what the store has now; returns the keys that nobody renews any more."""
        return self._records.take(values)

    @property
    def has_endpoint(self) -> bool:
        """Whether any endpoint tells what waits."""
        return any(True for _ in self._records.alive())

    def of(self, model: str, *, within_s: float, begun_within_s: float) -> Waiting:
        """What all endpoints together know of the model; see `add_up`."""
        mine = [record.told[model] for _, record in self._records.alive() if model in record.told]
        return add_up(mine, within_s=within_s, begun_within_s=begun_within_s)
