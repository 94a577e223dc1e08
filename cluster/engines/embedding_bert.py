"""A BERT encoder for short texts on CPUs with bf16: what Transformers' modules compute, in two thirds of their time.

A question has some twenty tokens. Multiplying them takes less time than everything around it: each linear layer brings
its weights into the processor's own layout anew, and a hundred modules call each other. Here the weights are brought
into that layout once, queries, keys and values are one multiplication, and the rest are plain functions. BERT: Devlin
et al., 2019, https://arxiv.org/abs/1810.04805, section 3, with the norm behind each block.

The operations with packed weights are those that PyTorch's own compiler emits (`torch/_inductor`); they are not public,
so `pack` compares what comes out with the model that it was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_MODEL_TYPES = {"bert", "xlm-roberta"}
_PACKED_FOR_TOKENS = 32
"""The layout is chosen for so many rows, and right for any number."""
_MIN_COSINE = 0.999
"""Of each token's state to that of the model; bf16 alone makes 0.9999."""


class PackedLinear:
    """A linear layer in bf16, optionally with GELU behind it: (..., in_features) to (..., out_features)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, activation: str = "none") -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_TOKENS)
        self._bias = bias
        self._activation = activation
        self._variant = "none" if activation == "gelu" else ""

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self._weight, self._bias, self._activation, [], self._variant
        )
        return result


class _Layer:
    def __init__(self, layer: Any, num_heads: int) -> None:
        attention = layer.attention.self
        parts = (attention.query, attention.key, attention.value)
        self._num_heads = num_heads
        self._qkv = PackedLinear(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
        self._attended = _packed(layer.attention.output.dense)
        self._attention_norm = layer.attention.output.LayerNorm
        self._wide = _packed(layer.intermediate.dense, "gelu")
        self._narrow = _packed(layer.output.dense)
        self._norm = layer.output.LayerNorm

    def __call__(self, states: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        num_texts, num_tokens, width = states.shape
        heads = self._qkv(states).view(num_texts, num_tokens, 3, self._num_heads, width // self._num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        found = self._attended(found.transpose(1, 2).reshape(num_texts, num_tokens, width))
        states = self._attention_norm(states + found)
        normed: torch.Tensor = self._norm(states + self._narrow(self._wide(states)))
        return normed


class PackedBert:
    """Made by `pack`."""

    def __init__(self, model: Any) -> None:
        self._embeddings = model.embeddings
        self._layers = [_Layer(layer, model.config.num_attention_heads) for layer in model.encoder.layer]

    def __call__(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Shapes (texts, tokens), mask 1 for what is text; gives the last states, (texts, tokens, width)."""
        states: torch.Tensor = self._embeddings(input_ids=token_ids)
        seen = None if bool(mask.all()) else mask.bool()[:, None, None, :]
        for layer in self._layers:
            states = layer(states, seen)
        return states


def pack(model: Any) -> PackedBert | None:
    """The same encoder, faster; None where the model is of another kind, or where PyTorch cannot do it here or computes
    something else. The linear layers of `model` are still its own: drop it."""
    config = model.config
    if config.model_type not in _MODEL_TYPES or config.hidden_act != "gelu" or config.is_decoder:
        return None
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        with torch.inference_mode():
            packed = PackedBert(model)
            return packed if _is_same(packed, model) else None
    except (AttributeError, RuntimeError, TypeError):  # another PyTorch: without these operations, or with other ones
        return None


def _is_same(packed: PackedBert, model: Any) -> bool:
    """On two texts of different lengths."""
    token_ids = torch.arange(2 * 24).reshape(2, 24) * 17 % int(model.config.vocab_size)
    mask = torch.ones_like(token_ids)
    token_ids[1, 15:], mask[1, 15:] = int(model.config.pad_token_id or 0), 0
    wanted = model(input_ids=token_ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
    got = packed(token_ids, mask)[mask.bool()].float()
    return bool(functional.cosine_similarity(got, wanted).min() >= _MIN_COSINE)


def _packed(layer: nn.Linear, activation: str = "none") -> PackedLinear:
    return PackedLinear(layer.weight, layer.bias, activation)
