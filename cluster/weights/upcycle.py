"""Makes a sparse mixture of experts (Mixtral) from a dense Llama-like checkpoint.

Sparse upcycling after Komatsuzaki et al. 2022 (arXiv:2212.05055): every expert starts as a copy of the feed-forward
block and a new router chooses among them. With identical experts the mixture answers as its parent does, since the
weights of the chosen experts sum to one. Distinct experts (seeded noise) make a wrong placement visible. The results
are standard checkpoints that Transformers and vLLM load; nothing here is trained, so nothing answers better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ModelDamaged
from cluster.weights.dense_checkpoint import (
    Heads,
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

ExpertVariant = Literal["identical", "distinct"]
Progress = Callable[[int, int], None]
"""Called with layers done and layers in all."""

_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True, slots=True)
class MixtureRecipe:
    """What to make of a dense parent.

    `rank_counts` are the numbers of tensor-parallel ranks that must divide the heads: heads are padded with zeros
    until they do. `noise` is the standard deviation of the distinct experts' noise, relative to each matrix's own.
    `router_skew` > 0 makes a few experts win most tokens: expert e's router row is scaled by exp(-skew * e / experts).
    """

    num_experts: int = 8
    experts_per_token: int = 2
    variant: ExpertVariant = "identical"
    router_seed: int = 0
    noise_seed: int = 0
    noise: float = 0.25
    router_skew: float = 0.0
    rank_counts: tuple[int, ...] = (1, 2, 4)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def check(self) -> None:
        if self.num_experts < 2:
            raise ModelDamaged(f"A mixture needs at least 2 experts, not {self.num_experts}.")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ModelDamaged(f"{self.experts_per_token} experts per token cannot be chosen of {self.num_experts}.")
        if any(self.num_experts % ranks for ranks in self.rank_counts):
            raise ModelDamaged(f"{self.num_experts} experts cannot be spread evenly over {self.rank_counts} ranks.")


def upcycle(parent: Path, folder: Path, recipe: MixtureRecipe, progress: Progress = lambda done, total: None) -> None:
    """Write a Mixtral checkpoint made from the dense checkpoint `parent` into `folder`, whole or not at all."""
    recipe.check()
    config = read_config(parent)
    heads = heads_of(config)
    padded = heads.padded(recipe.rank_counts)
    with open_tensors(parent) as tensors:
        made = _mixture_tensors(tensors, config, recipe, heads, padded, progress)
        save_checkpoint(folder, made, _mixtral_config(config, recipe, padded), parent)


def _mixture_tensors(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    recipe: MixtureRecipe,
    heads: Heads,
    padded: Heads,
    progress: Progress,
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    num_layers = int(config["num_hidden_layers"])
    router = torch.Generator().manual_seed(recipe.router_seed)
    for name in tensors:
        if ".mlp." in name:
            continue
        tensor = tensors[name]
        yield name, as_type(pad_heads(name, tensor, heads, padded), recipe.dtype)
    scale = torch.exp(-recipe.router_skew * torch.arange(recipe.num_experts) / recipe.num_experts)
    for layer in range(num_layers):
        weight = torch.randn(recipe.num_experts, int(config["hidden_size"]), generator=router) * scale[:, None]
        yield f"model.layers.{layer}.block_sparse_moe.gate.weight", as_type(weight, recipe.dtype)
        for expert in range(recipe.num_experts):
            for ours, theirs in _PROJECTIONS.items():
                parent = tensors[f"model.layers.{layer}.mlp.{theirs}.weight"]
                yield (
                    _expert_name(layer, expert, ours),
                    as_type(_vary(parent, recipe, layer, expert, ours), recipe.dtype),
                )
        progress(layer + 1, num_layers)


def _vary(parent: torch.Tensor, recipe: MixtureRecipe, layer: int, expert: int, projection: str) -> torch.Tensor:
    """The expert's matrix: a copy of the parent's, with noise of its own seed where experts are distinct."""
    import torch

    if recipe.variant == "identical":
        return parent.clone()  # tensors that share memory cannot be saved
    number = (layer * recipe.num_experts + expert) * len(_PROJECTIONS) + list(_PROJECTIONS).index(projection)
    generator = torch.Generator().manual_seed(recipe.noise_seed * 1_000_003 + number)
    values = parent.float()
    return values + recipe.noise * values.std() * torch.randn(values.shape, generator=generator)


def _expert_name(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"


def _mixtral_config(config: Mapping[str, Any], recipe: MixtureRecipe, padded: Heads) -> dict[str, Any]:
    return {
        **common_config(config, recipe.dtype, padded),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": config["intermediate_size"],
        "num_local_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.experts_per_token,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
    }
