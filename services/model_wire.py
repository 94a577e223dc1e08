"""What a model replica is asked over HTTP: JSON into records. The caller is our own endpoint, behind the secret, so a
wrong body is our bug; it is still answered with a sentence that names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from cluster.engine import Delivered, GenerationRequest, SamplingParams
from cluster.errors import InvalidRequest

RenderKind = Literal["chat", "completion", "events"]


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """How the stream is to look. `first_role`: begin a chat with the chunk that names the assistant."""

    kind: RenderKind = "events"
    id: str = ""
    model: str = ""
    created: int = 0
    include_usage: bool = False
    first_role: bool = False
    num_characters: int = 0
    """Text of the answer that other replicas have sent already."""


_RENDER_FIELDS = frozenset(field.name for field in fields(RenderOptions))
_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))
_DELIVERED_FIELDS = frozenset(field.name for field in fields(Delivered))
_REQUEST_FIELDS = frozenset(field.name for field in fields(GenerationRequest))


def parse_object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError as error:
        raise InvalidRequest(f"The body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidRequest("The body is not a JSON object.")
    return data


def parse_generation(body: bytes) -> tuple[GenerationRequest, RenderOptions]:
    data = parse_object(body)
    render = _closed(data.pop("render", {}), _RENDER_FIELDS, "render")
    if render.get("kind", "events") not in ("chat", "completion", "events"):
        raise InvalidRequest(f"render.kind is {render['kind']!r}; use chat, completion or events.", param="render")
    sampling = _closed(data.pop("sampling", {}), _SAMPLING_FIELDS, "sampling")
    if sampling.get("logit_bias") is not None:  # JSON has no integer keys
        sampling["logit_bias"] = {int(token): float(bias) for token, bias in sampling["logit_bias"].items()}
    sampling["stop"] = tuple(sampling.get("stop") or ())
    request = _closed(data, _REQUEST_FIELDS, "the request")
    request.setdefault("request_id", "")
    if request.get("delivered") is not None:
        delivered = _closed(request["delivered"], _DELIVERED_FIELDS, "delivered")
        request["delivered"] = Delivered(tuple(delivered["token_ids"]), delivered["num_characters"])
        render["num_characters"] = delivered["num_characters"]
    return GenerationRequest(**request, sampling=SamplingParams(**sampling)), RenderOptions(**render)


def _closed(value: Any, known: frozenset[str], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{where} is not a JSON object.", param=where)
    if unknown := sorted(value.keys() - known):
        raise InvalidRequest(f"{where} has no field {unknown[0]!r}.", param=unknown[0])
    return dict(value)
