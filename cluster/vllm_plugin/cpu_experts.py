"""Expert parallelism in vLLM's CPU experts: a rank computes only the pairs of token and expert that it holds.

vLLM's CPU kernels ignore the expert map and read beyond the weights. Here the rows of local pairs are gathered, the
grouped product runs with one expert per row, and the results are added up per token in float32. Without an expert map
everything is as vLLM has it. Kernels of quantized experts are refused where experts are spread over ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def install() -> None:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    original = cpu_moe.CPUUnquantizedExperts.apply

    def apply(
        self: Any,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        router_logits: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        **routing: Any,
    ) -> torch.Tensor:
        if expert_map is None:
            return original(
                self,
                hidden_states,
                w1,
                w2,
                router_logits,
                activation,
                global_num_experts,
                expert_map,
                a1q_scale,
                apply_router_weight_on_input,
                **routing,
            )
        if self._use_zentorch:
            raise NotImplementedError("zentorch's expert kernel knows no expert map; uninstall zentorch on this node")
        weights, ids = self._select_experts(
            hidden_states,
            router_logits,
            routing.get("num_expert_group"),
            routing.get("topk_group"),
            routing.get("e_score_correction_bias"),
            routing.get("routed_scaling_factor"),
        )
        if apply_router_weight_on_input:
            hidden_states = hidden_states * weights.to(hidden_states.dtype)
        rows, local_ids, local_weights = local_pairs(ids, weights, expert_map)
        self.note_computed(local_ids)
        if not rows.shape[0]:
            return hidden_states.new_zeros(hidden_states.shape)
        products = cpu_moe.cpu_fused_moe(
            hidden_states.index_select(0, rows),
            w1,
            w2,
            self.w1_bias,
            self.w2_bias,
            local_weights[:, None],
            local_ids[:, None],
            activation.value,
            self.isa,
            apply_router_weight_on_input,
        )
        return sum_per_token(products, rows, hidden_states.shape[0])

    cpu_moe.CPUUnquantizedExperts.apply = apply
    cpu_moe.CPUUnquantizedExperts.note_computed = _note_nothing
    _refuse_expert_maps(cpu_moe)
    _hide_from_the_compiler(MoERunner)


def local_pairs(
    ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs whose expert is held here: row of the token, local id of the expert (int32), weight; each [pairs].

    `ids` and `weights` are [tokens, experts per token] over all experts; `expert_map` is [experts], with -1 for those
    that other ranks hold.
    """
    # `index_select` takes a third of the time that indexing takes, and each layer of each step comes through here.
    local = expert_map.index_select(0, ids.flatten())
    chosen = (local >= 0).nonzero().flatten()
    return chosen // ids.shape[1], local.index_select(0, chosen), weights.flatten().index_select(0, chosen)


def sum_per_token(products: torch.Tensor, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Adds `products` [pairs, hidden] up to [num_tokens, hidden]; tokens without a pair get zeros."""
    import torch

    total = torch.zeros((num_tokens, products.shape[1]), dtype=torch.promote_types(products.dtype, torch.float32))
    total.index_add_(0, rows, products.to(total.dtype))
    return total.to(products.dtype)


def _note_nothing(self: Any, local_ids: torch.Tensor) -> None:
    """The expert counters hook in here."""


def _refuse_expert_maps(cpu_moe: Any) -> None:
    """vLLM then says that no kernel supports this parallel configuration, instead of computing wrong numbers."""

    def supports(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_ep

    for name in ("CPUExpertsFp8", "CPUExpertsMxfp4", "CPUExpertsInt4", "CPUExpertsInt8"):
        getattr(cpu_moe, name)._supports_parallel_config = staticmethod(supports)


def _hide_from_the_compiler(runner: Any) -> None:
    """On CPU vLLM lets the compiler look into the experts. The number of local pairs differs with every step, and the
    exchange must run in the same order on all ranks, so spread experts are one opaque operation, as on GPUs."""
    original = runner._select_forward

    def select_forward(self: Any) -> Any:
        import torch
        from vllm.config import CompilationMode, get_current_vllm_config

        is_compiled = get_current_vllm_config().compilation_config.mode != CompilationMode.NONE
        if is_compiled and self._shared_experts is None:
            return torch.ops.vllm.moe_forward
        if is_compiled:
            return torch.ops.vllm.moe_forward_shared
        return original(self)

    runner._select_forward = select_forward
