"""Places each layer's experts as planned, where vLLM knows only linear and round-robin placement for all layers.

The expert map of a layer is set before its weights are loaded, so that each rank loads the experts that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.vllm_plugin.options import expert_ranks

if TYPE_CHECKING:
    import torch


def install() -> None:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models.utils import extract_layer_index

    original = RoutedExperts.__init__

    def init(self: Any, layer_name: str, *args: Any, expert_map_manager: Any, **more: Any) -> None:
        ranks = expert_ranks(get_current_vllm_config(), extract_layer_index(layer_name))
        if ranks is not None and expert_map_manager.use_ep:
            held = expert_map_manager.local_num_experts
            expert_map_manager._expert_map = expert_map(ranks, expert_map_manager.ep_rank, held)
        original(self, layer_name, *args, expert_map_manager=expert_map_manager, **more)

    RoutedExperts.__init__ = init


def expert_map(ranks: Sequence[int], rank: int, num_held: int) -> torch.Tensor:
    """From the rank of each expert to this rank's map [experts], int32: the local id, or -1 for experts elsewhere.

    Raises `ValueError` where the plan does not give this rank the number of experts that it has room for.
    """
    import torch

    held = [expert for expert, owner in enumerate(ranks) if owner == rank]
    if len(held) != num_held:
        raise ValueError(f"The placement gives rank {rank} {len(held)} experts, but it has room for {num_held}.")
    result = torch.full((len(ranks),), -1, dtype=torch.int32)
    result[held] = torch.arange(num_held, dtype=torch.int32)
    return result
