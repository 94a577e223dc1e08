"""What Ray Serve says of every application: what runs, what is pending, and why.

Asking Serve blocks for some milliseconds, so a background task asks every two seconds and readers get the last
answer. (`serve.status()` would take ten times as long: it builds and serializes the configuration of each deployment.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MODEL_APP_PREFIX = "llm-"
_EVERY_S = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeploymentState:
    name: str
    status: str
    message: str = ""
    replicas: Mapping[str, int] = field(default_factory=dict)
    """Number of replicas by state (RUNNING, STARTING, ...)."""
    scales_to_zero: bool = False


@dataclass(frozen=True, slots=True)
class ApplicationState:
    name: str
    status: str
    message: str = ""
    deployments: tuple[DeploymentState, ...] = ()

    @property
    def has_running_replica(self) -> bool:
        """Also true while a new version is being rolled out beside the old one."""
        return any(deployment.replicas.get("RUNNING", 0) for deployment in self.deployments)

    @property
    def starts_on_demand(self) -> bool:
        """Whether a request is what starts its first replica, as far as Serve can start it at all."""
        return self.status != "DEPLOY_FAILED" and any(deployment.scales_to_zero for deployment in self.deployments)

    @property
    def reason(self) -> str:
        """What Serve says, one sentence per deployment that does not run as it should."""
        reasons = [d.message for d in self.deployments if d.status != "HEALTHY" and d.message]
        return " ".join(dict.fromkeys(reasons)) or self.message


class ServeStates:
    """The last known state of all applications. `read` blocks and is called in a thread."""

    def __init__(self, read: Callable[[], dict[str, ApplicationState]]) -> None:
        self._read = read
        self._applications: dict[str, ApplicationState] = {}
        self._were_there: set[str] = set()
        """Applications that had a running replica since this process started."""
        self._answered: set[str] = set()
        """Applications that answered since Serve was asked last: they have a replica, whatever it said then."""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.refresh()
        self._task = asyncio.create_task(self._refresh_for_ever(), name="serve states")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def refresh(self) -> None:
        self._answered.clear()
        try:
            self._applications = await asyncio.to_thread(self._read)
            self._were_there |= {name for name, state in self._applications.items() if state.has_running_replica}
        except Exception as error:  # noqa: BLE001  # Serve's controller fails in many ways while it restarts
            _log.warning("Ray Serve does not tell its state: %s. Trying again.", error)

    def applications(self) -> list[ApplicationState]:
        return list(self._applications.values())

    def application(self, name: str) -> ApplicationState | None:
        return self._applications.get(name)

    def note_answer(self, name: str) -> None:
        self._answered.add(name)

    def has_running_replica(self, name: str) -> bool:
        state = self._applications.get(name)
        return name in self._answered or (state is not None and state.has_running_replica)

    def is_changing(self, name: str) -> bool:
        """Whether an application that served has no replica because Serve brings up its next version. Neither its first
        start nor a crash is a change."""
        state = self._applications.get(name)
        if state is None or state.has_running_replica:
            return False
        return state.status == "DEPLOYING" and name in self._were_there

    def configured_models(self) -> list[str]:
        names = (name for name in self._applications if name.startswith(MODEL_APP_PREFIX))
        return sorted(name.removeprefix(MODEL_APP_PREFIX) for name in names)

    def starts_on_demand(self, model: str) -> bool:
        """Whether requests may wait for the model although it has no replica."""
        state = self._applications.get(MODEL_APP_PREFIX + model)
        return state is not None and state.starts_on_demand

    def is_deploying(self, model: str) -> bool:
        """Whether Serve is bringing up a model that is new or changed."""
        state = self._applications.get(MODEL_APP_PREFIX + model)
        return state is not None and state.status == "DEPLOYING"

    def why_not_ready(self, model: str) -> str:
        return self.why_application_not_ready(MODEL_APP_PREFIX + model, f"The model '{model}'")

    def why_application_not_ready(self, name: str, subject: str) -> str:
        state = self._applications.get(name)
        if state is None:
            return f"{subject} is not ready and Ray Serve does not know it yet. Try again in a moment."
        said = f" Ray Serve says: {state.reason.strip()}" if state.reason.strip() else ""
        return f"{subject} is not ready: its application '{name}' is {state.status}.{said}"

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            await self.refresh()


def read_serve() -> dict[str, ApplicationState]:
    """The states from Ray Serve; must run in a process that is connected to Ray."""
    from services.ray_adapter import connected_client, serve_details

    applications = serve_details(connected_client())["applications"]
    return {name: read_application(name, details) for name, details in applications.items()}


def read_application(name: str, details: Mapping[str, Any]) -> ApplicationState:
    """From an application of Serve's schema `ServeInstanceDetails`."""
    deployments = tuple(
        DeploymentState(
            name=deployment,
            status=_text(state["status"]),
            message=state["message"],
            # No Counter: its copies, which dataclasses make, count its items.
            replicas=dict(Counter(_text(replica["state"]) for replica in state["replicas"])),
            scales_to_zero=_min_replicas(state) == 0,
        )
        for deployment, state in details["deployments"].items()
    )
    return ApplicationState(name, _text(details["status"]), details["message"], deployments)


def _min_replicas(state: Mapping[str, Any]) -> int | None:
    """Where Serve scales the deployment."""
    scaling = (state.get("deployment_config") or {}).get("autoscaling_config")
    return scaling["min_replicas"] if isinstance(scaling, Mapping) else None


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
