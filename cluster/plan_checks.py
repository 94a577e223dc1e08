"""Requests that no plan can answer, refused with the cause and what would do."""

from __future__ import annotations

from cluster.errors import PlanError
from cluster.plan import PlanRequest
from cluster.sizing import ModelShape
from cluster.topology import Topology


def check_request(topology: Topology, request: PlanRequest) -> None:
    """Raises `PlanError`."""
    shape = request.shape
    _check_numbers(request)
    if request.work.context > shape.max_context:
        raise PlanError(
            f"{shape.name} takes at most {shape.max_context} tokens of context; {request.work.context} were asked for."
        )
    tensor = request.tensor or 1
    if shape.num_heads % tensor:
        divisors = [size for size in range(1, shape.num_heads + 1) if shape.num_heads % size == 0]
        raise PlanError(
            f"{tensor} tensor-parallel ranks do not divide the {shape.num_heads} attention heads of {shape.name}; "
            f"use one of {', '.join(map(str, divisors))}."
        )
    _check_kv_heads(shape, tensor)
    if (request.pipeline or 1) > 1 and (request.data or 1) > 1:
        raise PlanError("A gang of data-parallel ranks has one pipeline stage: leave pipeline or data out.")
    ranks = tensor * (request.data or 1)
    if shape.is_sparse and ranks > shape.num_experts + request.redundant_experts:
        raise PlanError(
            f"{ranks} ranks are more than the {shape.num_experts} experts of {shape.name}; "
            f"use at most {shape.num_experts}."
        )
    slots = shape.num_experts + request.redundant_experts
    if shape.is_sparse and (request.tensor or request.data) and slots % ranks:
        what = "experts with their copies" if request.redundant_experts else "experts"
        raise PlanError(
            f"The {slots} {what} of {shape.name} cannot be spread evenly over {ranks} ranks; use a divisor."
        )
    if request.data and request.data > 1 and not shape.is_sparse:
        raise PlanError(f"{shape.name} is dense: use replicas instead of {request.data} data-parallel ranks.")
    if request.loads is not None:
        if not shape.is_sparse:
            raise PlanError(f"{shape.name} has no experts, so there is no expert load to plan with.")
        request.loads.check(shape)
    if request.redundant_experts and request.loads is None:
        raise PlanError("Redundant experts are chosen by their load: give a routing trace as well.")
    if request.redundant_experts and not topology.has_accelerators:
        raise PlanError("Redundant experts need GPUs: on CPU nodes each expert of a gang lies on one rank.")


def _check_numbers(request: PlanRequest) -> None:
    if request.replicas < 1:
        raise PlanError(f"At least one replica is needed, not {request.replicas}.")
    counts = {
        "token of context": request.work.context,
        "sequence": request.work.num_sequences,
        "token in a step": request.work.batch_tokens,
        "tensor-parallel rank": request.tensor,
        "pipeline stage": request.pipeline,
        "data-parallel rank": request.data,
    }
    for what, count in counts.items():
        if count is not None and count < 1:
            raise PlanError(f"At least one {what} is needed, not {count}.")
    if not 0 < request.cores_per_rank < float("inf"):
        raise PlanError(f"A rank needs a share of a core above 0, not {request.cores_per_rank:g}.")
    if request.redundant_experts < 0:
        raise PlanError(f"There cannot be {request.redundant_experts} copies of experts; 0 is the least.")


def _check_kv_heads(shape: ModelShape, tensor: int) -> None:
    if shape.num_kv_heads % tensor and tensor % shape.num_kv_heads:
        raise PlanError(
            f"{tensor} tensor-parallel ranks and the {shape.num_kv_heads} key-value heads of {shape.name} do not "
            "divide each other."
        )
