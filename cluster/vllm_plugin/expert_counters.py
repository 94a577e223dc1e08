"""Counts in each worker which experts the router chose, and which pairs of token and expert were computed.

On where the engine asks for it. Per layer a token adds one to each pair of experts that it chose together; the diagonal
of that matrix is the number of tokens per expert. It is one small matrix product per layer and step. A data-parallel
rank counts the tokens that it routed itself, never those that other ranks sent to its experts; rows that only fill a
batch (an idle rank's, or padding) are counted apart, so that nothing that was computed is missing from the books.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.vllm_plugin.options import counts_experts

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class LayerCounts:
    """Counts of one layer in this process, in float64: exact up to 2**53, and what matrix products give.

    `together[a, b]`: tokens of this rank's own requests that went to both a and b; the diagonal: to a. `filling[e]`:
    rows of this rank that belong to no request. `computed[e]`: rows that this rank computed, whoever routed them.
    """

    num_experts: int
    together: torch.Tensor = field(init=False)
    filling: torch.Tensor = field(init=False)
    computed: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        import torch

        self.together = torch.zeros((self.num_experts, self.num_experts), dtype=torch.float64)
        self.filling = torch.zeros(self.num_experts, dtype=torch.float64)
        self.computed = torch.zeros(self.num_experts, dtype=torch.float64)

    def note_routed(self, ids: torch.Tensor, num_real: int) -> None:
        """`ids` [rows, experts per token] of this rank; the first `num_real` rows belong to requests."""
        if num_real:
            chosen = _one_hot(ids[:num_real], self.num_experts)
            self.together += chosen.T @ chosen
        if num_real < ids.shape[0]:
            self.filling += _one_hot(ids[num_real:], self.num_experts).sum(0)

    def note_computed(self, ids: torch.Tensor) -> None:
        """`ids` [pairs], over all experts of the layer."""
        import torch

        self.computed += torch.bincount(ids.flatten(), minlength=self.num_experts)


@dataclass(slots=True)
class WorkerCounts:
    """What one worker process counts. `num_real` is the number of rows of requests in the step that runs."""

    is_on: bool = False
    layers: dict[int, LayerCounts] = field(default_factory=dict)
    num_real: int = 0
    since: float = field(default_factory=time.time)

    def reset(self) -> None:
        for layer in self.layers.values():
            layer.reset()
        self.since = time.time()


counts = WorkerCounts()
"""Of this process."""


def install() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.v1.worker.cpu_worker import CPUWorker

    _count_requests_in(CPUWorker)
    _count_choices_in(CPUUnquantizedExperts)


def _count_requests_in(worker: Any) -> None:
    load, execute = worker.load_model, worker.execute_model

    def load_model(self: Any, *args: Any, **more: Any) -> Any:
        counts.is_on = counts_experts(self.vllm_config)
        return load(self, *args, **more)

    def execute_model(self: Any, scheduler_output: Any) -> Any:
        # Whatever runs outside of this (an idle rank's step, warming up) is no request's.
        counts.num_real = scheduler_output.total_num_scheduled_tokens
        try:
            return execute(self, scheduler_output)
        finally:
            counts.num_real = 0

    worker.load_model = load_model
    worker.execute_model = execute_model


def _count_choices_in(experts: Any) -> None:
    load, select = experts.process_weights_after_loading, experts._select_experts

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        load(self, layer)
        self.layer_counts = None
        if counts.is_on:
            number = extract_layer_index(layer.layer_name)
            self.layer_counts = counts.layers.setdefault(number, LayerCounts(layer.global_num_experts))
            # None: there is no expert map, this rank computes all pairs.
            self.held = None if layer.expert_map is None else _held_experts(layer.expert_map)

    def select_experts(self: Any, *args: Any, **more: Any) -> Any:
        weights, ids = select(self, *args, **more)
        if self.layer_counts is not None:
            own = _own_rows(ids)
            self.layer_counts.note_routed(own, min(counts.num_real, own.shape[0]))
            if self.held is None:
                self.layer_counts.note_computed(ids)
        return weights, ids

    def note_computed(self: Any, local_ids: torch.Tensor) -> None:
        if self.layer_counts is not None:
            self.layer_counts.note_computed(self.held[local_ids])

    from vllm.model_executor.models.utils import extract_layer_index

    experts.process_weights_after_loading = process_weights_after_loading
    experts._select_experts = select_experts
    experts.note_computed = note_computed


def _held_experts(expert_map: torch.Tensor) -> torch.Tensor:
    """The expert behind each local id."""
    held = (expert_map >= 0).nonzero().flatten()
    return held[expert_map[held].argsort()]


def _own_rows(ids: torch.Tensor) -> torch.Tensor:
    """Of the rows of all data-parallel ranks, those that this rank's requests brought."""
    from vllm.distributed import get_dp_group
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().dp_metadata
    if metadata is None:
        return ids
    sizes, group = metadata.get_chunk_sizes_across_dp_rank(), get_dp_group()
    parts = len(sizes) // group.world_size
    first = sum(sizes[: group.rank_in_group * parts])
    return ids[first : first + sum(sizes[group.rank_in_group * parts :][:parts])]


def _one_hot(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    import torch

    return torch.zeros((ids.shape[0], num_experts)).scatter_(1, ids.long(), 1.0)
