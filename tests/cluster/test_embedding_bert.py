"""The packed encoder: the same states as Transformers' modules, and never in their place where they differ."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.requires("vllm")]


def small_encoder(**settings: Any) -> Any:
    """Seeded weights; large enough for PyTorch's packed layouts."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160}
    config = BertConfig(vocab_size=500, initializer_range=0.2, **shape | settings)
    return BertModel(config).to(torch.bfloat16).eval()


def computes_bf16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.parametrize(("num_texts", "num_tokens"), [(1, 1), (1, 19), (3, 32), (8, 100)])
def test_the_packed_encoder_computes_the_states_of_the_model(num_texts: int, num_tokens: int) -> None:
    import torch

    from cluster.engines.embedding_bert import pack

    model = small_encoder()
    packed = pack(model)
    assert (packed is not None) == computes_bf16()
    if packed is None:
        return
    token_ids = torch.randint(1, 500, (num_texts, num_tokens))
    mask = torch.ones_like(token_ids)
    for row in range(1, num_texts):  # each text shorter than the one before it
        token_ids[row, num_tokens - 3 * row :], mask[row, num_tokens - 3 * row :] = 0, 0
    with torch.inference_mode():
        wanted = model(input_ids=token_ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
        got = packed(token_ids, mask)[mask.bool()].float()
    assert torch.nn.functional.cosine_similarity(got, wanted).min() > 0.999
    assert (got - wanted).abs().max() < 0.1  # bf16 has eight bits, and states are around 1


@pytest.mark.parametrize("settings", [{"hidden_act": "relu"}, {"is_decoder": True}])
def test_what_is_computed_otherwise_is_not_packed(settings: dict[str, Any]) -> None:
    from cluster.engines.embedding_bert import pack

    assert pack(small_encoder(**settings)) is None


def test_an_encoder_that_comes_out_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be where a release of PyTorch means something else by the same operation."""
    from cluster.engines import embedding_bert

    right = embedding_bert.PackedLinear.__call__
    monkeypatch.setattr(embedding_bert.PackedLinear, "__call__", lambda self, states: right(self, states).roll(1, -1))
    assert embedding_bert.pack(small_encoder()) is None
    monkeypatch.setattr(embedding_bert.PackedLinear, "__call__", lambda self, states: self.no_such_operation)
    assert embedding_bert.pack(small_encoder()) is None
