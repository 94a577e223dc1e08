"""Linear layers of half precision compute in float32 where the CPU has no arithmetic of half precision.

There PyTorch multiplies bfloat16 matrices number by number: measured on AVX2 (AMD EPYC Milan, one core), 32 rows run
at 10 GFLOP/s against 50 in float32. So these layers keep their weights in float32; attention, experts and cache stay in
half precision. It costs two more bytes for each weight outside the experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def install() -> None:
    import torch
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        original(layer, remove_weight)
        if is_slow(weight) and layer.weight is weight:  # vLLM found no kernel of its own, so it kept the weight
            layer.cpu_linear = in_float32(weight)
            if remove_weight:
                layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    utils.dispatch_cpu_unquantized_gemm = dispatch


def is_slow(weight: torch.Tensor) -> bool:
    import torch

    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    return is_half and weight.ndim == 2 and not torch.cpu._is_avx512_bf16_supported() and _is_x86()


def in_float32(weight: torch.Tensor) -> Any:
    """A function (rows, weight, bias) -> rows of the same type as `rows`; its own copy of `weight` is used."""
    import torch
    from torch.nn.functional import linear

    wide = weight.detach().to(torch.float32)

    def compute(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(rows.to(torch.float32), wide, None if bias is None else bias.to(torch.float32)).to(rows.dtype)

    return compute


def _is_x86() -> bool:
    from vllm.platforms import CpuArchEnum, current_platform

    return bool(current_platform.get_cpu_architecture() == CpuArchEnum.X86)
