"""Experts in bfloat16 by a kernel that uses the CPU's arithmetic of bfloat16, where it has no tiles for it (AMX).

There vLLM takes its kernel for any x86 processor, which multiplies number by number. It brings another one, for
quantized experts, that multiplies bfloat16 too. With one core of an AMD EPYC with AVX512-BF16 a layer of 8 experts of
3 x 576 x 1536, 2 per token, takes 0.43 ms for one token (0.58 before), 2.8 ms for 32 (4.7), and 39 ms for 768 (89).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PLAIN = 0
"""The kernel's method without quantization."""


def install() -> None:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    load = cpu_moe.CPUUnquantizedExperts.process_weights_after_loading
    pack, compute = cpu_moe.cpu_prepack_moe_weight, cpu_moe.cpu_fused_moe

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        if is_slow(self.isa, layer.w13_weight, self.moe_config.activation.value, self.w1_bias, self.w2_bias):
            cpu_moe.cpu_prepack_moe_weight = packed
        try:
            load(self, layer)
        finally:
            cpu_moe.cpu_prepack_moe_weight = pack

    def cpu_fused_moe(
        rows: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        weights: torch.Tensor,
        ids: torch.Tensor,
        activation: str,
        isa: str,
        is_weighted: bool = False,
    ) -> torch.Tensor:
        if is_slow(isa, w13, activation, w13_bias, w2_bias):
            return gated_experts(rows, w13, w2, weights.new_ones(weights.shape) if is_weighted else weights, ids)
        return compute(rows, w13, w2, w13_bias, w2_bias, weights, ids, activation, isa, is_weighted)

    cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = process_weights_after_loading
    cpu_moe.cpu_fused_moe = cpu_fused_moe


def is_slow(isa: str, w13: torch.Tensor, activation: str, *biases: torch.Tensor | None) -> bool:
    """Whether vLLM would take its kernel for any x86 processor although this one can do better.

    Asked when weights are packed and in each step, so it must not depend on anything that changes in between.
    """
    import torch

    return (
        isa == "vec"
        and w13.dtype == torch.bfloat16
        and activation == "silu"
        and all(bias is None for bias in biases)
        and torch.cpu._is_avx512_bf16_supported()
    )


def packed(weight: torch.Tensor, isa: str) -> torch.Tensor:
    """[experts, outputs, inputs] as `gated_experts` wants it, in the same shape."""
    import torch

    return torch.ops._C.convert_weight_packed(weight)


def gated_experts(
    rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Gated feed-forward blocks (SiLU): per row the sum of what its experts give, times their weights.

    `rows` [rows, hidden]; `w13` [experts, 2 * intermediate, hidden], the gate first, and `w2` [experts, hidden,
    intermediate], both packed; `ids` (int32) and `weights` (float32) [rows, experts per row].
    """
    import torch

    # The kernel reads memory as it lies, without looking at strides.
    given = (rows.contiguous(), w13, w2, weights.contiguous(), ids.contiguous())
    none_of_quantized = [None] * 9
    return torch.ops._C.fused_experts_cpu(*given, False, _PLAIN, *none_of_quantized, True)
