"""Linear layers of half precision compute in float32 where half precision is slow, and only there."""

import pytest

pytestmark = pytest.mark.requires("vllm")


@pytest.fixture
def layer():
    import torch

    made = torch.nn.Linear(64, 48, bias=True, dtype=torch.bfloat16)
    made.requires_grad_(False)
    return made


def test_the_product_is_rounded_once(layer) -> None:
    import torch

    from cluster.vllm_plugin.cpu_linear import in_float32

    rows = torch.randn(5, 64).to(torch.bfloat16)
    exact = rows.double() @ layer.weight.double().T + layer.bias.double()
    result = in_float32(layer.weight)(rows, layer.weight, layer.bias)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, exact.to(torch.bfloat16))


@pytest.mark.parametrize(("has_bf16", "is_wide"), [(False, True), (True, False)])
def test_it_is_on_only_where_the_cpu_lacks_the_arithmetic(
    layer, has_bf16: bool, is_wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from vllm.model_executor.layers import utils

    from cluster.vllm_plugin import cpu_linear

    kept = []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(cpu_linear, "_is_x86", lambda: True)
    monkeypatch.setattr(cpu_linear, "in_float32", lambda weight: kept.append(weight) or torch.nn.functional.linear)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", lambda layer, remove_weight: None)
    cpu_linear.install()
    wide = torch.nn.Linear(64, 48)
    utils.dispatch_cpu_unquantized_gemm(wide, remove_weight=True)
    assert kept == []
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert bool(kept) is is_wide
    assert (layer.weight.numel() == 0) is is_wide, "one copy is enough"
