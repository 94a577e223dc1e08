"""Experts in bfloat16 take the faster kernel where the processor has the arithmetic, and compute the same."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.requires("vllm")

EXPERTS, CHOSEN, HIDDEN, WIDE = 4, 2, 64, 96


@pytest.fixture
def weights():
    import torch

    random = torch.Generator().manual_seed(1)
    up = torch.randn(EXPERTS, 2 * WIDE, HIDDEN, generator=random) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, WIDE, generator=random) / WIDE**0.5
    return up.to(torch.bfloat16), down.to(torch.bfloat16)


def routed(tokens: int):
    import torch

    random = torch.Generator().manual_seed(tokens)
    chosen = torch.randn(tokens, EXPERTS, generator=random).softmax(-1).topk(CHOSEN)
    return torch.randn(tokens, HIDDEN, generator=random).to(torch.bfloat16), chosen.values, chosen.indices.int()


def exact(rows, up, down, shares, ids):
    import torch
    from torch.nn.functional import silu

    result = torch.zeros(rows.shape, dtype=torch.float64)
    for row, expert, share in (
        (r, int(e), s) for r in range(len(rows)) for e, s in zip(ids[r], shares[r], strict=True)
    ):
        gate, value = (up[expert].double() @ rows[row].double()).chunk(2)
        result[row] += share.double() * (down[expert].double() @ (silu(gate) * value))
    return result


@pytest.fixture
def vllms_kernel(monkeypatch: pytest.MonkeyPatch):
    """vLLM's class of experts and its two functions, put back afterwards."""
    import vllm._custom_ops  # noqa: F401 - loads the kernels
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    kernel = cpu_moe.CPUUnquantizedExperts
    monkeypatch.setattr(kernel, "process_weights_after_loading", kernel.process_weights_after_loading)
    for name in ("cpu_fused_moe", "cpu_prepack_moe_weight", "is_zentorch_moe_supported"):
        monkeypatch.setattr(cpu_moe, name, getattr(cpu_moe, name))
    return cpu_moe


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("is_used", [True, False])
def test_either_kernel_gives_what_the_experts_make_of_each_row(
    weights, vllms_kernel, tokens: int, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from cluster.vllm_plugin import bf16_experts

    has_bf16 = is_used and torch.cpu._is_avx512_bf16_supported()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    taken = []
    compute = bf16_experts.gated_experts
    monkeypatch.setattr(bf16_experts, "gated_experts", lambda *given: taken.append(1) or compute(*given))
    bf16_experts.install()
    layer = loaded(vllms_kernel, *weights)
    rows, shares, ids = routed(tokens)
    result = vllms_kernel.cpu_fused_moe(rows, layer.w13_weight, layer.w2_weight, None, None, shares, ids, "silu", "vec")
    wanted = exact(rows, *weights, shares, ids)
    assert result.dtype == torch.bfloat16
    assert (result.double() - wanted).norm() < 0.01 * wanted.norm()
    assert bool(taken) is has_bf16


def test_weights_that_were_applied_before_are_not_applied_again(weights, vllms_kernel) -> None:
    import torch

    from cluster.vllm_plugin import bf16_experts

    bf16_experts.install()
    layer = loaded(vllms_kernel, *weights)
    rows, shares, ids = routed(3)
    given = (rows, layer.w13_weight, layer.w2_weight, None, None, shares[:, :1], ids[:, :1], "silu", "vec", True)
    wanted = exact(rows, *weights, torch.ones(3, 1), ids[:, :1])
    assert (vllms_kernel.cpu_fused_moe(*given).double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize(
    ("isa", "dtype", "activation", "has_bias"),
    [
        ("amx", "bfloat16", "silu", False),
        ("vec", "float32", "silu", False),
        ("vec", "bfloat16", "gelu", False),
        ("vec", "bfloat16", "silu", True),
    ],
)
def test_all_others_stay_with_vllms_kernel(
    isa: str, dtype: str, activation: str, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from cluster.vllm_plugin.bf16_experts import is_slow

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    weight = torch.zeros(1, dtype=getattr(torch, dtype))
    assert is_slow("vec", torch.zeros(1, dtype=torch.bfloat16), "silu", None, None)
    assert not is_slow(isa, weight, activation, None, weight if has_bias else None)


def loaded(cpu_moe, up, down):
    """A layer after vLLM has packed its weights."""
    import torch
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(up.clone(), requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(down.clone(), requires_grad=False)
    for name in ("use_grouped_topk", "renormalize", "scoring_func", "custom_routing_function"):
        setattr(layer, name, None)
    kernel = object.__new__(cpu_moe.CPUUnquantizedExperts)
    kernel.moe_config = SimpleNamespace(
        activation=MoEActivation.SILU, intermediate_size_per_partition=WIDE, hidden_dim=HIDDEN
    )
    kernel.quant_config = SimpleNamespace(w1_bias=None, w2_bias=None)
    cpu_moe.is_zentorch_moe_supported = lambda layer: False
    kernel.process_weights_after_loading(layer)
    return layer
