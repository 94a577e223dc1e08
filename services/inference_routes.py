"""Routes that OpenAI's clients know: chat, completions, embeddings, models."""

from __future__ import annotations

import time
from typing import Any

from cluster.engine import Usage
from services.calls import Calls
from services.config import PlatformConfig
from services.errors import invalid
from services.event_stream import until_client_leaves
from services.generation import Generation
from services.key_limits import KeyLimits
from services.model_queues import ModelQueues
from services.openai_api import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, embedding_answer
from services.relay import ModelStates, ReplicaSource, unknown_model
from services.routing import Answer, Call, Route, json_answer, list_answer
from services.token_estimate import estimate_chat, estimate_completion, estimate_embedding
from services.token_meter import Estimate


class InferenceRoutes:
    """Each request for an answer or a vector is let in by the limits of its key, when all else is checked."""

    def __init__(
        self,
        generation: Generation,
        queues: ModelQueues,
        embedding: Calls,
        replicas: ReplicaSource,
        states: ModelStates,
        config: PlatformConfig,
        limits: KeyLimits,
    ) -> None:
        self._generation = generation
        self._queues = queues
        self._embedding = embedding
        self._embedding_model = config.embedding_model
        self._replicas = replicas
        self._states = states
        self._config = config
        self._max_body_mib = config.max_body_mib
        self._limits = limits
        self._started_at = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("POST", "/v1/chat/completions", self.chat),
            Route("POST", "/v1/completions", self.complete),
            Route("POST", "/v1/embeddings", self.embed),
            Route("GET", "/v1/models", self.list_models),
            Route("GET", "/v1/models/{id}", self.get_model),
        ]

    async def chat(self, call: Call) -> Answer | None:
        request = await call.parse(ChatCompletionRequest, self._max_body_mib)
        call.client_user = request.user
        self._refuse_embedding_model(request.model)
        self._generation.require(request.model)
        async with self._limits.admitted(call, lambda: self._estimate(request)):
            return await self._generation.chat(call, request)

    async def complete(self, call: Call) -> Answer | None:
        request = await call.parse(CompletionRequest, self._max_body_mib)
        call.client_user = request.user
        self._refuse_embedding_model(request.model)
        self._generation.require(request.model)
        async with self._limits.admitted(call, lambda: estimate_completion(request)):
            return await self._generation.complete(call, request)

    async def embed(self, call: Call) -> Answer:
        request = await call.parse(EmbeddingRequest, self._max_body_mib)
        call.client_user = request.user
        if request.model != self._embedding_model:
            raise unknown_model(request.model, [self._embedding_model])
        call.model = request.model
        async with self._limits.admitted(call, lambda: estimate_embedding(request)):
            return await until_client_leaves(call.receive, self._embed_in_turn(call, request))

    async def _embed_in_turn(self, call: Call, request: EmbeddingRequest) -> Answer:
        num_tokens = estimate_embedding(request).num_prompt_tokens
        async with self._queues.place(request.model, call.actor.key_id, "default", num_tokens):
            return await self._embed(call, request)

    async def _embed(self, call: Call, request: EmbeddingRequest) -> Answer:
        meter = call.meter
        if meter is not None:
            meter.begin()
        if ids := request.token_ids():
            result = await self._embedding.call("embed_token_ids", ids)
        else:
            result = await self._embedding.call("embed", request.texts(), request.input_type or "query")
        if meter is not None:
            meter.finish(Usage(int(sum(result.num_tokens)), 0))
        dimension = int(result.vectors.shape[1])
        if request.dimensions not in (None, dimension):
            raise invalid(
                f"'dimensions' is {request.dimensions}, but {request.model} gives {dimension}. Leave it out.",
                param="dimensions",
                code="unsupported_value",
            )
        return json_answer(
            embedding_answer(request, request.model, result.vectors, result.num_tokens, result.truncated)
        )

    def _estimate(self, request: ChatCompletionRequest) -> Estimate:
        return estimate_chat(request, self._config.chat.default_max_tokens, self._config.retrieval.top_k)

    async def list_models(self, call: Call) -> Answer:
        return list_answer(self._models())

    async def get_model(self, call: Call) -> Answer:
        models = self._models()
        wanted = call.parameters["id"]
        for model in models:
            if model["id"] == wanted:
                return json_answer(model)
        raise unknown_model(wanted, [model["id"] for model in models])

    def _models(self) -> list[dict[str, Any]]:
        """The default model first: it is what page and command line take where nobody names one."""
        names = {*self._states.configured_models(), *self._replicas.models()}
        ordered = sorted(names, key=lambda name: (name != self._config.default_model, name))
        chat = [self._model(name, "chat") for name in ordered]
        return [*chat, {**self._head(self._embedding_model), "kind": "embedding"}]

    def _model(self, name: str, kind: str) -> dict[str, Any]:
        replicas = self._replicas.replicas(name)
        is_ready = bool(replicas) or self._states.starts_on_demand(name)
        model = {**self._head(name), "kind": kind, "ready": is_ready}
        if replicas:
            model["max_context"] = replicas[0].info.get("max_context")
        return model

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started_at, "owned_by": "windfarm"}

    def _refuse_embedding_model(self, model: str) -> None:
        if model == self._embedding_model:
            raise invalid(
                f"'{model}' turns text into vectors and cannot chat. GET /v1/models lists the chat models.",
                param="model",
                code="unsupported_value",
            )
