"""What Serve runs as the public endpoint: reads the surroundings, opens the port, and keeps the endpoint alive.

The process imports no engine. Several replicas may share the port; each checks keys, relays and tells chats by itself.
"""

import asyncio
import contextlib
import os
import socket

from ray import serve
from ray.serve.handle import DeploymentHandle

from services.beats import RayBeatStore
from services.calls import ServeCalls
from services.chat import make_story
from services.config import Environment, PlatformConfig
from services.database import Database
from services.demand import DemandBeacon
from services.discovery import RELAY_APP, Beacon, Directory, ReplicaEndpoint
from services.endpoint import PLATFORM_APP, Endpoint, Surroundings
from services.environment import LOOPBACK, public_address, read_environment
from services.knowledge_calls import RemoteSearcher, RemoteSentenceEmbedder
from services.limiter import LimiterCalls
from services.listener import start_listener, start_listener_on
from services.model_status import ServeStates, read_serve
from services.public_port import public_socket
from services.ray_adapter import close_replica_ports
from services.replica_log import log_into_replica_file
from services.reranker import make_reranking

STORE_APP, STORE_DEPLOYMENT = "store", "Store"
EMBED_APP, EMBED_DEPLOYMENT = "embed", "Embedding"
# How long streams may still take where windfarm ends.
_DOWN_DRAIN_S = 4.0
# The balancer looks every half second at a directory that is refreshed every second.
_NOTICE_S = 1.7


class Gateway:
    """One replica of the public endpoint. `beside` makes Serve start the page (and a load balancer) with it; they meet
    through discovery."""

    async def __init__(self, config: PlatformConfig, *beside: DeploymentHandle) -> None:  # type: ignore[misc]
        """Serve awaits this; the port is open when it returns."""
        close_replica_ports()
        log_into_replica_file()
        environment = read_environment()
        self._config = config
        host, port = public_address(config.listen, environment)
        self._directory = Directory(RayBeatStore())
        self._states = ServeStates(read_serve)
        self._database = Database(environment.database_url)
        store, embedding = self._calls(STORE_APP, STORE_DEPLOYMENT), self._calls(EMBED_APP, EMBED_DEPLOYMENT)
        self._endpoint = Endpoint(
            Surroundings(
                config=config,
                home=environment.home,
                secret=environment.internal_secret,
                listen_host=host,
                database=self._database,
                replicas=self._directory,
                states=self._states,
                store=store,
                embedding=embedding,
                limiter=LimiterCalls(),
                story=make_story(
                    config,
                    RemoteSearcher(store, config.retrieval, make_reranking(config.retrieval, embedding)),
                    RemoteSentenceEmbedder(embedding),
                ),
            )
        )
        await asyncio.gather(self._directory.start(), self._states.start())
        app = self._endpoint.app
        if config.listen.balancer == "haproxy":
            # A port of its own, which only the balancer is told of.
            self._listener = await start_listener(app, environment.internal_host, websockets=True)
        else:
            self._listener = await start_listener_on(_public_sockets(environment, host, port), app, websockets=True)
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._beacon = Beacon(RayBeatStore(), ReplicaEndpoint(replica_id, RELAY_APP, self._listener.url, os.getpid()))
        await self._beacon.start()
        self._demand = DemandBeacon(RayBeatStore(), replica_id, self._endpoint.demand)
        self._endpoint.on_sleeper = self._demand.hurry
        await self._demand.start()
        await self._endpoint.start()

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self._listener.is_running:
            raise RuntimeError("the public listener has ended")

    async def __del__(self) -> None:
        """Serve awaits this at a graceful shutdown. Parts are missing where the constructor failed."""
        with contextlib.suppress(AttributeError):
            notice_s = _NOTICE_S if self._config.listen.balancer == "haproxy" else 0.0
            await self._beacon.set_state("draining")
            await asyncio.sleep(notice_s)
            # Where this process alone is replaced its streams have time: a client's connection cannot be moved.
            drain_s = self._config.streams.relay_drain_s
            await self._listener.stop(_DOWN_DRAIN_S - notice_s if self._is_all_ending() else drain_s)
            await self._beacon.stop()
            await self._demand.stop()
            await self._endpoint.stop()
            await self._states.stop()
            await self._directory.stop()
            self._database.close()

    def _is_all_ending(self) -> bool:
        """Whether the application goes, and not only this process of it."""
        platform = self._states.application(PLATFORM_APP)
        return platform is None or platform.status == "DELETING"

    def _calls(self, app: str, deployment: str) -> ServeCalls:
        def why_not_ready() -> str | None:
            if self._states.has_running_replica(app):
                return None
            return self._states.why_application_not_ready(app, f"What '{app}' does")

        # Applications start side by side, so the other one may not be known yet; calls say so until it is.
        handle = serve.get_deployment_handle(deployment, app_name=app, _check_exists=False)
        return ServeCalls(
            handle,
            why_not_ready,
            is_changing=lambda: self._states.is_changing(app),
            on_answer=lambda: self._states.note_answer(app),
        )


def _public_sockets(environment: Environment, host: str, port: int) -> list[socket.socket]:
    """Where this process has a network of its own, the public port is opened outside, and inside for the page."""
    if environment.public_namespace is None:
        return [public_socket(environment, host, port)]
    inside = public_socket(environment, LOOPBACK, port)
    return [inside, public_socket(environment, host, port, environment.public_namespace)]
