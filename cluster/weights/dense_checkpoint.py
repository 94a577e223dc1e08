"""Dense Llama and Mistral checkpoints as the raw material of others: read, checked, heads padded, written whole.

What is read has been checked against its config; what is written appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ModelDamaged, ModelNotFound
from cluster.weights.checkpoint_check import check_checkpoint, read_json
from cluster.weights.safetensors_header import read_tensor_infos

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4 << 30
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


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a dense checkpoint; refused when it is of another kind."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder} holds no checkpoint: there is no {path.name} in it.")
    config = read_json(path)
    found = config.get("architectures") or ["nothing"]
    if found[0] not in _PARENTS:
        raise ModelDamaged(f"{folder} is a {found[0]}; only {', '.join(_PARENTS)} can be used here.")
    if config.get("quantization_config"):
        raise ModelDamaged(f"{folder} is quantized; take the checkpoint in bfloat16, float16 or float32.")
    return config


def heads_of(config: Mapping[str, Any]) -> Heads:
    num_query = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or int(config["hidden_size"]) // num_query)
    return Heads(num_query, int(config.get("num_key_value_heads") or num_query), width)


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[Mapping[str, torch.Tensor]]:
    """The tensors of a dense checkpoint, each read when it is asked for. A config that does not match is refused."""
    from safetensors import safe_open

    check_checkpoint(folder)
    infos = read_tensor_infos(folder)
    with contextlib.ExitStack() as opened:
        files = {
            file: opened.enter_context(safe_open(file, framework="pt")) for file in {i.file for i in infos.values()}
        }
        yield _LazyTensors({name: files[info.file] for name, info in infos.items()})


class _LazyTensors(Mapping[str, "torch.Tensor"]):
    """So that a parent of any size needs no more memory than one of its tensors."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def pad_heads(name: str, tensor: torch.Tensor, heads: Heads, padded: Heads) -> torch.Tensor:
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


def as_type(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return tensor.to({"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]).contiguous()


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


def common_config(config: Mapping[str, Any], dtype: str, heads: Heads) -> dict[str, Any]:
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


def save_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Mapping[str, Any],
    tokenizer_from: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint with the tokenizer of another, whole or not at all: one file, or several with their index."""
    if folder.exists():
        raise ModelDamaged(f"{folder} exists already: name another folder, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save_shards(part, tensors, shard_bytes)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in _TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copy2(tokenizer_from / name, part / name)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _save_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    from safetensors.torch import save_file

    names: list[list[str]] = []
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, folder / f"{len(names)}.part", metadata={"format": "pt"})
        names.append(list(shard))
    if len(names) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    placed: dict[str, str] = {}
    for number, held in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        placed |= dict.fromkeys(held, file)
    total = sum(info.num_bytes for info in read_tensor_infos(folder).values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
