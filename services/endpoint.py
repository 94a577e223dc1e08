"""Puts the public endpoint together from what surrounds it, starts it and stops it. No Ray here: tests do the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import aiohttp

from cluster.engine import GenerationRequest, SamplingParams
from services.accounts import Accounts
from services.calls import Calls
from services.cluster_routes import ClusterRoutes
from services.config import PlatformConfig
from services.conversation_routes import ConversationRoutes
from services.conversations import Conversations
from services.database import Database
from services.discovery import RELAY_APP, ReplicaEndpoint
from services.document_routes import DocumentRoutes
from services.expert_observatory import ExpertObservatory
from services.feedback import FeedbackBook
from services.feedback_routes import FeedbackRoutes
from services.file_routes import FileRoutes
from services.files import Files
from services.gateway_app import GatewayApp
from services.generation import ChatStory, Generation
from services.host_check import HostCheck
from services.inference_routes import InferenceRoutes
from services.job_routes import JobRoutes
from services.key_limits import KeyLimits
from services.knowledge_calls import RemoteSearcher
from services.knowledge_routes import KnowledgeRoutes
from services.limit_client import LimitClient
from services.mcp_routes import McpRoutes
from services.metrics import Metrics
from services.model_queues import SEARCHES, TUNINGS, ModelQueues
from services.model_status import MODEL_APP_PREFIX, ApplicationState
from services.people import People
from services.people_routes import PeopleRoutes
from services.readiness import Readiness
from services.receipt_routes import ReceiptRoutes
from services.relay import ModelPool, ModelStates, PooledModel, ReplicaSource, open_session
from services.reranker import make_reranking
from services.sharing_routes import SharingRoutes
from services.status_routes import StatusRoutes
from services.transfer_routes import TransferRoutes
from services.ui_proxy import UiProxy
from services.vector_store_routes import VectorStoreRoutes
from services.vector_stores import VectorStores

PLATFORM_APP = "platform"
UPLOADS_FOLDER, FILES_FOLDER = "uploads", "files"
EMBEDDING_REQUESTS = 64
"""Requests for vectors that begin at once, of all relays together: they fill a batch while another one is computed."""
SEARCH_REQUESTS = 32
"""Searches that begin at once, of all relays together: fewer than the store takes calls, so that uploads reach it."""
TUNINGS_AT_ONCE = 1
"""The same of tunings: they last, and nobody waits for them as for an answer."""


class Replicas(ReplicaSource, Protocol):
    """The directory of announced replicas."""

    def endpoints(self, app: str | None = None) -> list[ReplicaEndpoint]: ...


class States(ModelStates, Protocol):
    """What Ray Serve says of all applications."""

    def applications(self) -> Sequence[ApplicationState]: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything that the endpoint talks to."""

    config: PlatformConfig
    home: Path
    secret: str
    listen_host: str
    database: Database
    replicas: Replicas
    states: States
    store: Calls
    embedding: Calls
    limiter: Calls
    story: ChatStory


class _OwnShare:
    """The models as the waiting rooms of this process see them: other relays let requests in as well."""

    def __init__(self, pool: ModelPool, replicas: Replicas, embedding_model: str) -> None:
        self._pool = pool
        self._replicas = replicas
        self._embedding_model = embedding_model
        self.sleeps = pool.sleeps
        self.why_not_ready = pool.why_not_ready

    def num_slots(self, model: str) -> int:
        num_relays = len([each for each in self._replicas.endpoints(RELAY_APP) if each.state == "ready"])
        if model in (SEARCHES, TUNINGS):
            num_slots = SEARCH_REQUESTS if model == SEARCHES else TUNINGS_AT_ONCE
        else:
            is_embedding = model == self._embedding_model
            num_slots = EMBEDDING_REQUESTS if is_embedding else self._pool.num_slots(model)
        return -(-num_slots // max(1, num_relays))


class Endpoint:
    """`app` answers requests from the moment it is made; `start` begins to prove that the answers are real."""

    def __init__(self, around: Surroundings) -> None:
        config = around.config
        self._around = around
        self._session = open_session(around.secret, config.upstream_connect_timeout_s)
        # Bodies of the page go through as they are, and cookies belong to browsers alone.
        self._ui_session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )
        self._limit_client = LimitClient(around.limiter)
        self._witness = ""
        self._readiness = Readiness(self._dependencies, self._prove)
        self.on_sleeper: Callable[[], None] = lambda: None
        """Called when a request begins to wait for a model that has to be started."""
        self.app = self._make_app()

    async def start(self) -> None:
        self._readiness.start()

    async def stop(self) -> None:
        await self._readiness.stop()
        await self._limit_client.stop()
        await self._session.close()
        await self._ui_session.close()

    def _note_sleeper(self) -> None:
        self.on_sleeper()

    def _make_app(self) -> GatewayApp:
        around, config = self._around, self._around.config
        observatory = ExpertObservatory(self._session, around.replicas, around.states)
        metrics = Metrics(around.replicas.endpoints, lambda: observatory.latest)
        self._pool = ModelPool(
            self._session, around.replicas, around.states, config.streams, on_moved=metrics.stream_moved
        )
        conversations = Conversations(around.database)
        share = _OwnShare(self._pool, around.replicas, config.embedding_model)
        queues = ModelQueues(config.queues, share, self._note_sleeper)
        self.demand = queues.demand
        metrics.watch_queues(queues.sizes)
        generation = Generation(config.chat, self._pool, queues, around.story, conversations, metrics)
        uploads = around.home / UPLOADS_FOLDER
        reranking = make_reranking(config.retrieval, around.embedding)
        searcher = RemoteSearcher(around.store, config.retrieval, reranking)
        files = Files(around.database, around.home / FILES_FOLDER)
        vector_stores = VectorStores(around.database, around.store, files)
        accounts = Accounts(around.database)
        routes = [
            *InferenceRoutes(
                generation,
                queues,
                around.embedding,
                around.replicas,
                around.states,
                config,
                KeyLimits(config.limits, self._limit_client, metrics),
            ).routes(),
            *ConversationRoutes(conversations).routes(),
            *KnowledgeRoutes(around.store, searcher, queues, uploads, config.max_body_mib).routes(),
            *JobRoutes(around.store).routes(),
            *DocumentRoutes(around.store).routes(),
            *FeedbackRoutes(FeedbackBook(around.database)).routes(),
            *FileRoutes(files, vector_stores, uploads, config.max_body_mib).routes(),
            *VectorStoreRoutes(vector_stores, searcher, queues).routes(),
            *McpRoutes(around.store, searcher, queues, version("windfarm")).routes(),
            *SharingRoutes(around.store).routes(),
            *ReceiptRoutes(around.store).routes(),
            *PeopleRoutes(People(around.database), accounts).routes(),
            *TransferRoutes(around.store, uploads).routes(),
            *StatusRoutes(
                self._readiness,
                metrics,
                around.states.applications,
                around.replicas.endpoints,
                observatory.refresh,
            ).routes(),
            *ClusterRoutes(observatory).routes(),
        ]
        page = UiProxy(
            self._ui_session,
            lambda: around.replicas.endpoints(PLATFORM_APP),
            around.secret,
            config.max_body_mib,
        )
        hosts = HostCheck(around.listen_host, config.listen.allowed_hosts)
        return GatewayApp(routes, accounts, metrics, hosts, page)

    def _dependencies(self) -> Hashable | None:
        """The replica that the proof rests on and the state of the other applications. A model that is started for a
        request answers without one, too."""
        model = self._around.config.default_model
        ids = sorted(replica.replica_id for replica in self._around.replicas.replicas(model))
        if self._around.states.starts_on_demand(model):
            ids = [""]
        elif not ids:
            return None
        if self._witness not in ids:  # others come and go with the load, which makes nothing less ready
            self._witness = ids[0]
        others = [
            (state.name, state.status)
            for state in self._around.states.applications()
            if not state.name.startswith(MODEL_APP_PREFIX) and state.name != PLATFORM_APP
        ]
        return (self._witness, tuple(sorted(others)))

    async def _prove(self) -> None:
        vector = self._around.embedding.call("embed", ["ready?"], "query")
        if self._pool.sleeps(self._around.config.default_model):
            await vector  # nobody waits for the model, so there is no reason to start it
        else:
            await asyncio.gather(self._prove_token(), vector)

    async def _prove_token(self) -> None:
        request = GenerationRequest(
            "ready", messages=[{"role": "user", "content": "Hello"}], sampling=SamplingParams(max_tokens=1)
        )
        model = PooledModel(self._pool, self._around.config.default_model)
        chunks = [chunk async for chunk in model.stream(request)]
        usage = chunks[-1].usage
        if usage is None or usage.num_completion_tokens < 1:
            raise RuntimeError(f"the model {self._around.config.default_model} gave no token")
