"""Linear layers in int8 for encoders on CPUs that have no fast 16-bit arithmetic.

Vector-wise quantization (Dettmers et al., "LLM.int8()", 2022, section 2): one scale for each output channel of the
weights, fixed once, and one for each token of the input, found anew in each call. One scale for a whole batch would be
spoilt by the few large values that encoders have, and would make a vector depend on its company.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_LARGEST = 127
_SMALLEST_SCALE = 1e-8
"""Keeps a row of zeros from being divided by zero."""


class Int8Linear(nn.Module):
    """A linear layer with int8 weights: input (..., in_features) in float32, output (..., out_features) in float32."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / _LARGEST).clamp_min(_SMALLEST_SCALE)
        self.register_buffer("weight", torch.round(weight / scale[:, None]).to(torch.int8).t().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, states.shape[-1])
        scale = (rows.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp_min(_SMALLEST_SCALE)
        product: Any = torch._int_mm(torch.round(rows / scale).to(torch.int8), self.weight)
        result: torch.Tensor = product.float() * scale * self.scale
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*states.shape[:-1], -1)


def quantize(model: nn.Module) -> None:
    """Put `Int8Linear` in the place of every linear layer of `model`."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, name, Int8Linear(child))
        else:
            quantize(child)
