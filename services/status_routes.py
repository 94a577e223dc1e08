"""Routes for operators and probes: health, readiness, metrics, who am I, what runs.

`/health` and `/ready` are open, so they tell a status and nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from services.discovery import ReplicaEndpoint
from services.metrics import CONTENT_TYPE, Metrics
from services.model_status import ApplicationState
from services.readiness import Readiness
from services.routing import Answer, Call, Route, json_answer


class StatusRoutes:
    def __init__(
        self,
        readiness: Readiness,
        metrics: Metrics,
        applications: Callable[[], Sequence[ApplicationState]],
        replicas: Callable[[], Sequence[ReplicaEndpoint]],
        before_scrape: Callable[[], Awaitable[None]],
    ) -> None:
        self._readiness = readiness
        self._metrics = metrics
        self._applications = applications
        self._replicas = replicas
        self._before_scrape = before_scrape

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/health", self.health, is_open=True),
            Route("GET", "/ready", self.ready, is_open=True),
            Route("GET", "/metrics", self.metrics),
            Route("GET", "/v1/me", self.me),
            Route("GET", "/v1/status", self.status),
        ]

    async def health(self, call: Call) -> Answer:
        return json_answer({"status": "ok"})

    async def ready(self, call: Call) -> Answer:
        if self._readiness.is_ready:
            return json_answer({"status": "ready"})
        return json_answer({"status": "starting"}, 503, {"retry-after": "1"})

    async def metrics(self, call: Call) -> Answer:
        await self._before_scrape()
        return Answer(self._metrics.text(), content_type=CONTENT_TYPE)

    async def me(self, call: Call) -> Answer:
        actor = call.actor
        return json_answer({"id": actor.user_id, "name": actor.name, "role": actor.role, "key_id": actor.key_id})

    async def status(self, call: Call) -> Answer:
        applications = self._applications()
        return json_answer(
            {
                "ready": self._readiness.is_ready,
                "not_ready_because": None if self._readiness.is_ready else self._readiness.last_failure,
                "applications": [_application(state) for state in applications],
                "replicas": [_replica(replica) for replica in self._replicas()],
            }
        )


def _application(state: ApplicationState) -> dict[str, Any]:
    return {
        "name": state.name,
        "status": state.status,
        "reason": state.reason,
        "deployments": [asdict(deployment) for deployment in state.deployments],
    }


def _replica(replica: ReplicaEndpoint) -> dict[str, Any]:
    return {
        "id": replica.replica_id,
        "application": replica.app,
        "model": replica.model,
        "state": replica.state,
        "pid": replica.pid,
        "running": replica.running,
        "queued": replica.queued,
        "info": dict(replica.info),
    }
