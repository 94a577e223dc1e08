"""Makes dense twins of a dense checkpoint: one with a sliding window, and one as large as a mixture made from it.

The sliding-window twin is a `MistralForCausalLM`, so that grouped-query attention and the window run for real. The wide
twin has the feed-forward blocks of a mixture side by side, all of them computed for every token: what a mixture of the
same total size is compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ModelDamaged
from cluster.weights.dense_checkpoint import (
    as_type,
    common_config,
    heads_of,
    open_tensors,
    pad_heads,
    read_config,
    save_checkpoint,
)

if TYPE_CHECKING:
    import torch


def sliding_window_twin(parent: Path, folder: Path, window: int, *, dtype: str = "bfloat16") -> None:
    """Write the weights of `parent` to `folder` as a `MistralForCausalLM` whose attention sees `window` tokens back."""
    if window < 1:
        raise ModelDamaged(f"A sliding window has at least one token, not {window}.")
    config = read_config(parent)
    twin = {
        **common_config(config, dtype, heads_of(config)),
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "intermediate_size": config["intermediate_size"],
        "sliding_window": window,
    }
    with open_tensors(parent) as tensors:
        made = ((name, as_type(tensor, dtype)) for name, tensor in tensors.items())
        save_checkpoint(folder, made, twin, parent)


def wide_twin(
    parent: Path,
    folder: Path,
    num_blocks: int = 8,
    *,
    rank_counts: tuple[int, ...] = (1, 2, 4),
    dtype: str = "bfloat16",
) -> None:
    """Write `parent` to `folder` with each feed-forward block `num_blocks` times side by side.

    The copies' outputs are added up, so each is divided by their number: the twin answers as its parent does, exactly
    where the number is a power of two. Heads are padded as in the mixture, for equal work outside the blocks.
    """
    if num_blocks < 1:
        raise ModelDamaged(f"A wide twin has at least one feed-forward block, not {num_blocks}.")
    config = read_config(parent)
    heads = heads_of(config)
    padded = heads.padded(rank_counts)
    twin = {
        **common_config(config, dtype, padded),
        "architectures": config["architectures"],
        "model_type": config["model_type"],
        "intermediate_size": num_blocks * int(config["intermediate_size"]),
        "sliding_window": config.get("sliding_window"),
    }
    with open_tensors(parent) as tensors:
        made = (
            (name, as_type(_widen(name, pad_heads(name, tensor, heads, padded), num_blocks), dtype))
            for name, tensor in tensors.items()
        )
        save_checkpoint(folder, made, twin, parent)


def _widen(name: str, tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    if name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
        return tensor.repeat(num_blocks, 1)
    if name.endswith("mlp.down_proj.weight"):
        return tensor.repeat(1, num_blocks) / num_blocks
    return tensor
