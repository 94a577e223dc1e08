"""What the experts of a model do, gathered from all of its replicas: each rank of a gang counts its own tokens.

Asked on demand; a replica that does not answer is named, never left out silently.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from cluster.errors import LoadError
from cluster.expert_load import ExpertLoad, sum_loads
from services.discovery import ReplicaEndpoint
from services.errors import ApiError, conflict, unavailable
from services.expert_counts import GangCounts, ModelExperts, Silence
from services.relay import ModelStates, ReplicaSource, unknown_model

# A replica answers between two steps of its engine.
_ANSWER_LIMIT_S = 15.0
# Whoever scrapes metrics commonly waits 10 seconds for all of them.
_SCRAPE_LIMIT_S = 5.0
# A scrape takes figures of this age, so that scrapes side by side ask the engines once.
_FRESH_S = 2.0


class ExpertObservatory:
    def __init__(self, session: aiohttp.ClientSession, replicas: ReplicaSource, states: ModelStates) -> None:
        self._session = session
        self._replicas = replicas
        self._states = states
        self._latest: list[ModelExperts] = []
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()

    @property
    def latest(self) -> Sequence[ModelExperts]:
        """Models with experts as they were at the last `refresh`."""
        return self._latest

    def known_models(self) -> list[str]:
        return sorted({*self._states.configured_models(), *self._replicas.models()})

    async def read(self, model: str, limit_s: float = _ANSWER_LIMIT_S) -> ModelExperts:
        """Ask all replicas of the model, each for `limit_s`. Raises `ApiError` for an unknown model and for one that
        does not run."""
        replicas = self._replicas.replicas(model)
        if not replicas:
            known = self.known_models()
            if model in known:
                raise unavailable(self._states.why_not_ready(model), code="model_not_ready", retry_after_s=5)
            raise unknown_model(model, known)
        answers = await asyncio.gather(*(self._ask(replica, limit_s) for replica in replicas))
        return _gather(model, list(zip(replicas, answers, strict=True)))

    async def refresh(self) -> None:
        """Read all models that have experts, for metrics. Does nothing where that was done a moment ago."""
        async with self._lock:
            if time.monotonic() - self._read_at < _FRESH_S:
                return
            sparse = [model for model in self._replicas.models() if self._is_sparse(model)]
            read = await asyncio.gather(*(self._read_if_there(model) for model in sparse))
            self._latest = [experts for experts in read if experts is not None]
            self._read_at = time.monotonic()

    async def _read_if_there(self, model: str) -> ModelExperts | None:
        try:
            return await self.read(model, _SCRAPE_LIMIT_S)
        except ApiError:  # it went away or is being replaced just now, so it has no figures in this scrape
            return None

    def _is_sparse(self, model: str) -> bool:
        """Replicas announce a fingerprint where there are experts, so that dense models need not be asked."""
        return any(replica.info.get("checkpoint") for replica in self._replicas.replicas(model))

    async def _ask(self, replica: ReplicaEndpoint, limit_s: float) -> ExpertLoad | Silence | None:
        try:
            async with (
                asyncio.timeout(limit_s),
                self._session.get(replica.url + "/experts") as response,
            ):
                body: dict[str, Any] = await response.json(content_type=None)
                if response.status != 200:
                    return Silence(replica.replica_id, str(body["error"]["message"]))
                return ExpertLoad.from_json(body["load"]) if body["has_experts"] else None
        except TimeoutError:
            return Silence(replica.replica_id, f"It did not answer within {limit_s:g} seconds.")
        except (aiohttp.ClientError, OSError) as error:
            return Silence(replica.replica_id, f"It cannot be reached ({type(error).__name__}).")
        except (LoadError, ValueError, KeyError, TypeError) as error:
            return Silence(replica.replica_id, f"Its answer cannot be read: {error}")


def _gather(model: str, answers: list[tuple[ReplicaEndpoint, ExpertLoad | Silence | None]]) -> ModelExperts:
    silent = tuple(answer for _, answer in answers if isinstance(answer, Silence))
    counted = [(replica, answer) for replica, answer in answers if isinstance(answer, ExpertLoad)]
    checkpoints = sorted({str(replica.info.get("checkpoint", "")) for replica, _ in counted})
    if len(checkpoints) > 1:
        raise conflict(
            f"The replicas of '{model}' serve different checkpoints just now ({', '.join(checkpoints)}). Ask again "
            "when the change has been applied.",
            code="model_changing",
        )
    if not counted:
        return ModelExperts(model, has_experts=None if silent else False, silent=silent)
    members: dict[str, list[tuple[ReplicaEndpoint, ExpertLoad]]] = {}
    for replica, load in counted:
        members.setdefault(replica.gang or replica.replica_id, []).append((replica, load))
    return ModelExperts(model, True, checkpoints[0], tuple(_gang(*item) for item in members.items()), silent)


def _gang(name: str, members: list[tuple[ReplicaEndpoint, ExpertLoad]]) -> GangCounts:
    members.sort(key=lambda member: (member[0].rank, member[0].replica_id))
    ids = tuple(replica.replica_id for replica, _ in members)
    try:
        return GangCounts(name, ids, sum_loads([load for _, load in members]))
    except LoadError as error:
        raise ApiError(500, "server_error", "experts_disagree", f"The ranks of gang {name}: {error}") from error
