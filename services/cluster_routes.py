"""Routes that show operators what the cluster does: the load of each expert of each model."""

from __future__ import annotations

from typing import Any

from services.accounts import Actor
from services.errors import ApiError, forbidden
from services.expert_counts import experts_json
from services.expert_observatory import ExpertObservatory
from services.routing import Answer, Call, Route, json_answer

_OPERATORS = ("owner", "operator")


class ClusterRoutes:
    def __init__(self, observatory: ExpertObservatory) -> None:
        self._observatory = observatory

    def routes(self) -> list[Route]:
        return [Route("GET", "/v1/cluster/experts", self.experts)]

    async def experts(self, call: Call) -> Answer:
        """Of the model named in the query, else of all; there a model that cannot tell has its reason in its place."""
        _require_operator(call.actor)
        if "model" in call.query:
            return json_answer(experts_json(await self._observatory.read(call.query["model"])))
        models = [await self._read(model) for model in self._observatory.known_models()]
        return json_answer({"object": "list", "data": models})

    async def _read(self, model: str) -> dict[str, Any]:
        try:
            return experts_json(await self._observatory.read(model))
        except ApiError as error:
            return {"model": model, "has_experts": None, "reason": error.message}


def _require_operator(actor: Actor) -> None:
    if actor.role not in _OPERATORS:
        raise forbidden("Only the owner and operators may look at the cluster. Ask with the owner's key.")
