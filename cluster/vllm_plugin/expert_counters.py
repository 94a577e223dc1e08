"""Counts in each worker which experts the router chose, and which pairs of token and expert were computed.

On where the engine asks for it. Per layer a token adds one to each pair of experts that it chose together; the diagonal
of that matrix is the number of tokens per expert. A data-parallel rank counts the tokens that it routed itself, never
those that other ranks sent to its experts; rows that only fill a batch (an idle rank's, or padding) are counted apart,
so that nothing that was computed is missing from the books.

While a step runs the layers' choices are only kept; they are counted together when it has ended, with a few operations
for all layers, because each operation costs as much as ten tokens.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cluster.vllm_plugin.options import counts_experts

if TYPE_CHECKING:
    import torch


class ExpertCounts:
    """Counts of one process, in float64: exact up to 2**53, and what matrix products give.

    `together[layer, a, b]`: tokens of this rank's own requests that went to both a and b; the diagonal: to a.
    `filling[layer, e]`: rows of this rank that belong to no request. `computed[layer, e]`: rows that this rank
    computed, whoever routed them. Layers are numbered in the order in which they were added.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.num_real = 0
        """Rows of requests in the step that runs; they come before rows that fill the batch."""
        self._held: list[torch.Tensor] = []
        self._num_experts = 0
        self._routed: list[torch.Tensor] = []
        self._routed_layers: list[int] = []
        self._computed: list[torch.Tensor] = []
        self._computed_layers: list[int] = []
        self.reset()

    def add_layer(self, num_experts: int, held: torch.Tensor | None) -> int:
        """`held`: the expert behind each local id; None where all experts are local. Returns the layer's number."""
        import torch

        self._held.append(torch.arange(num_experts) if held is None else held)
        self._num_experts = num_experts
        self.reset()
        return len(self._held) - 1

    def reset(self) -> None:
        import torch

        layers, experts = len(self._held), self._num_experts
        self._drop()
        self.together = torch.zeros((layers, experts, experts), dtype=torch.float64)
        self.filling = torch.zeros((layers, experts), dtype=torch.float64)
        self.computed = torch.zeros((layers, experts), dtype=torch.float64)
        self.since = time.time()

    def note_routed(self, layer: int, ids: torch.Tensor) -> None:
        """`ids` [rows, experts per token] that this rank routed."""
        if layer in self._routed_layers:  # a new step has begun where nobody said that one ended
            self.end_step()
        self._routed.append(ids)
        self._routed_layers.append(layer)

    def note_computed(self, layer: int, local_ids: torch.Tensor) -> None:
        """`local_ids` [pairs] that this rank computes."""
        self._computed.append(local_ids.flatten())
        self._computed_layers.append(layer)

    def begin_step(self, num_real: int) -> None:
        self.end_step()
        self.num_real = num_real

    def end_step(self) -> None:
        """Counts what was kept."""
        if self._routed:
            self._count_routed()
        if self._computed:
            self._count_computed()
        self._drop()

    def _count_routed(self) -> None:
        import torch

        ids = torch.stack(self._routed).long()
        real = min(self.num_real, ids.shape[1])
        chosen = torch.zeros((*ids.shape[:2], self._num_experts)).scatter_(2, ids, 1.0)
        if real:
            requests = chosen[:, :real]
            self.together[self._routed_layers] += requests.transpose(1, 2) @ requests
        if real < ids.shape[1]:
            self.filling[self._routed_layers] += chosen[:, real:].sum(1)

    def _count_computed(self) -> None:
        import torch

        layers = torch.tensor(self._computed_layers)
        of_pair = layers.repeat_interleave(torch.tensor([len(ids) for ids in self._computed]))
        held = torch.stack(self._held)[of_pair, torch.cat(self._computed).long()]
        counted = torch.bincount(of_pair * self._num_experts + held, minlength=self.computed.numel())
        self.computed += counted.view_as(self.computed)

    def _drop(self) -> None:
        self._routed, self._routed_layers, self._computed, self._computed_layers = [], [], [], []
        self.num_real = 0


counts = ExpertCounts()
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
        if not counts.is_on:
            return execute(self, scheduler_output)
        # Whatever runs outside of this (an idle rank's step, warming up) is no request's.
        counts.begin_step(scheduler_output.total_num_scheduled_tokens)
        try:
            return execute(self, scheduler_output)
        finally:
            counts.end_step()

    worker.load_model = load_model
    worker.execute_model = execute_model


def _count_choices_in(experts: Any) -> None:
    load, select = experts.process_weights_after_loading, experts._select_experts

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        load(self, layer)
        self.counted_layer = None
        if counts.is_on:
            self.computes_all = layer.expert_map is None
            held = None if self.computes_all else held_experts(layer.expert_map)
            self.counted_layer = counts.add_layer(layer.global_num_experts, held)

    def select_experts(self: Any, *args: Any, **more: Any) -> Any:
        weights, ids = select(self, *args, **more)
        if self.counted_layer is not None:
            counts.note_routed(self.counted_layer, _own_rows(ids))
            if self.computes_all:
                counts.note_computed(self.counted_layer, ids)
        return weights, ids

    def note_computed(self: Any, local_ids: torch.Tensor) -> None:
        if self.counted_layer is not None:
            counts.note_computed(self.counted_layer, local_ids)

    experts.process_weights_after_loading = process_weights_after_loading
    experts._select_experts = select_experts
    experts.note_computed = note_computed


def held_experts(expert_map: torch.Tensor) -> torch.Tensor:
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
