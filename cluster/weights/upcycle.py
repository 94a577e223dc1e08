"""Makes other checkpoints from a dense Llama-like one: a sparse mixture (Mixtral), and a sliding-window Mistral.

Sparse upcycling after Komatsuzaki et al. 2022 (arXiv:2212.05055): every expert starts as a copy of the feed-forward
block and a new router chooses among them. With identical experts the mixture answers as its parent does, since the
weights of the chosen experts sum to one. Distinct experts (seeded noise) make a wrong placement visible. The results
are standard checkpoints that Transformers and vLLM load; nothing here is trained, so nothing answers better.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ModelDamaged, ModelNotFound

if TYPE_CHECKING:
    import torch

ExpertVariant = Literal["identical", "distinct"]
Progress = Callable[[int, int], None]
"""Called with layers done and layers in all."""

_PARENTS = ("LlamaForCausalLM", "MistralForCausalLM")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
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


@dataclass(frozen=True, slots=True)
class Heads:
    """Numbers of query and key-value heads, and the width of one head."""

    num_query: int
    num_kv: int
    width: int

    @property
    def per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_query // self.num_kv

    def padded(self, rank_counts: tuple[int, ...]) -> Heads:
        """The smallest numbers, groups unchanged, that every rank count divides."""
        num_kv = self.num_kv
        while any(num_kv % ranks for ranks in rank_counts):
            num_kv += 1
        return Heads(num_kv * self.per_group, num_kv, self.width)


def upcycle(parent: Path, folder: Path, recipe: MixtureRecipe, progress: Progress = lambda done, total: None) -> None:
    """Write a Mixtral checkpoint made from the dense checkpoint `parent` into `folder`, whole or not at all."""
    recipe.check()
    config = read_config(parent)
    heads = _heads(config)
    padded = heads.padded(recipe.rank_counts)
    tensors = _load(parent, config)
    made = dict(_mixture_tensors(tensors, config, recipe, heads, padded, progress))
    _save(folder, made, _mixtral_config(config, recipe, padded), parent)


def sliding_window_twin(parent: Path, folder: Path, window: int, *, dtype: str = "bfloat16") -> None:
    """Write the weights of `parent` to `folder` as a `MistralForCausalLM` whose attention sees `window` tokens back."""
    if window < 1:
        raise ModelDamaged(f"A sliding window has at least one token, not {window}.")
    config = read_config(parent)
    tensors = _load(parent, config)
    made = {name: _as(tensor, dtype) for name, tensor in tensors.items()}
    twin = {
        **_common_config(config, dtype, _heads(config)),
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "intermediate_size": config["intermediate_size"],
        "sliding_window": window,
    }
    _save(folder, made, twin, parent)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a dense checkpoint; refused when it is of another kind."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFound(f"{folder} holds no checkpoint: cannot read {path.name} ({error.strerror}).") from error
    except ValueError as error:
        raise ModelDamaged(f"{path} is not JSON: {error}. Copy the checkpoint again.") from error
    found = config.get("architectures") or ["nothing"]
    if found[0] not in _PARENTS:
        raise ModelDamaged(f"{folder} is a {found[0]}; only {', '.join(_PARENTS)} can be used here.")
    return dict(config)


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
    for name, tensor in tensors.items():
        if ".mlp." in name:
            continue
        yield name, _as(_pad_heads(name, tensor, heads, padded), recipe.dtype)
    scale = torch.exp(-recipe.router_skew * torch.arange(recipe.num_experts) / recipe.num_experts)
    for layer in range(num_layers):
        weight = torch.randn(recipe.num_experts, int(config["hidden_size"]), generator=router) * scale[:, None]
        yield f"model.layers.{layer}.block_sparse_moe.gate.weight", _as(weight, recipe.dtype)
        for expert in range(recipe.num_experts):
            for ours, theirs in _PROJECTIONS.items():
                parent = tensors[f"model.layers.{layer}.mlp.{theirs}.weight"]
                yield _expert_name(layer, expert, ours), _as(_vary(parent, recipe, layer, expert, ours), recipe.dtype)
        progress(layer + 1, num_layers)


def _vary(parent: torch.Tensor, recipe: MixtureRecipe, layer: int, expert: int, projection: str) -> torch.Tensor:
    """The expert's matrix: a copy of the parent's, with noise of its own seed where experts are distinct."""
    import torch

    if recipe.variant == "identical":
        return parent.clone()
    number = (layer * recipe.num_experts + expert) * len(_PROJECTIONS) + list(_PROJECTIONS).index(projection)
    generator = torch.Generator().manual_seed(recipe.noise_seed * 1_000_003 + number)
    values = parent.float()
    return values + recipe.noise * values.std() * torch.randn(values.shape, generator=generator)


def _expert_name(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"


def _pad_heads(name: str, tensor: torch.Tensor, heads: Heads, padded: Heads) -> torch.Tensor:
    """Zero rows for new query, key and value heads, zero columns in the output projection: they add nothing."""
    import torch.nn.functional as functional

    if padded == heads:
        return tensor
    if name.endswith("q_proj.weight"):
        return functional.pad(tensor, (0, 0, 0, (padded.num_query - heads.num_query) * heads.width))
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        return functional.pad(tensor, (0, 0, 0, (padded.num_kv - heads.num_kv) * heads.width))
    if name.endswith("o_proj.weight"):
        return functional.pad(tensor, (0, (padded.num_query - heads.num_query) * heads.width))
    return tensor


def _heads(config: Mapping[str, Any]) -> Heads:
    num_query = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or int(config["hidden_size"]) // num_query)
    return Heads(num_query, int(config.get("num_key_value_heads") or num_query), width)


def _mixtral_config(config: Mapping[str, Any], recipe: MixtureRecipe, padded: Heads) -> dict[str, Any]:
    return {
        **_common_config(config, recipe.dtype, padded),
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


_KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "tie_word_embeddings",
    "vocab_size",
)


def _common_config(config: Mapping[str, Any], dtype: str, heads: Heads) -> dict[str, Any]:
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ModelDamaged("A parent with biases cannot be used: Mistral and Mixtral have none.")
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    return {
        **kept,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": heads.width,
        "num_attention_heads": heads.num_query,
        "num_key_value_heads": heads.num_kv,
        "use_cache": True,
    }


def _load(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a dense checkpoint; a config that does not match them is refused."""
    tensors = _read_tensors(folder)
    heads = _heads(config)
    hidden, wide = int(config["hidden_size"]), int(config["intermediate_size"])
    for layer in range(int(config["num_hidden_layers"])):
        stem = f"model.layers.{layer}"
        _expect(folder, tensors, f"{stem}.self_attn.q_proj.weight", (heads.num_query * heads.width, hidden))
        _expect(folder, tensors, f"{stem}.self_attn.k_proj.weight", (heads.num_kv * heads.width, hidden))
        _expect(folder, tensors, f"{stem}.mlp.gate_proj.weight", (wide, hidden))
        _expect(folder, tensors, f"{stem}.mlp.down_proj.weight", (hidden, wide))
    _expect(folder, tensors, "model.embed_tokens.weight", (int(config["vocab_size"]), hidden))
    return tensors


def _expect(folder: Path, tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, int]) -> None:
    if name not in tensors:
        raise ModelDamaged(f"{folder}: the config promises {name}, but the weights lack it. Copy the checkpoint again.")
    if tuple(tensors[name].shape) != shape:
        raise ModelDamaged(
            f"{folder}: {name} has the shape {tuple(tensors[name].shape)}, but the config says {shape}. "
            "The config and the weights are of different models."
        )


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelDamaged(f"{folder} has no .safetensors weights; convert the checkpoint first.")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise ModelDamaged(f"{file} is damaged: {error}. Copy the checkpoint again.") from error
    return tensors


def _as(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return tensor.to({"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]).contiguous()


def _save(folder: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, Any], tokenizer_from: Path) -> None:
    from safetensors.torch import save_file

    if folder.exists():
        raise ModelDamaged(f"{folder} exists already: name another folder, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in _TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copy2(tokenizer_from / name, part / name)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
