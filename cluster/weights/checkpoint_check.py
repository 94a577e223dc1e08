"""Whether the configuration of a checkpoint matches its tensors, told from the files' headers before anything starts.

Checked are the architectures whose tensors we know: Llama, Mistral and Mixtral, unquantized. Of others only that the
files are whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ModelDamaged
from cluster.sizing import ModelShape, shape_from_config
from cluster.weights.safetensors_header import TensorInfo, read_tensor_infos

_DENSE = ("LlamaForCausalLM", "MistralForCausalLM")
_KNOWN = (*_DENSE, "MixtralForCausalLM")
_EMBEDDING = "model.embed_tokens.weight"


def check_checkpoint(folder: Path) -> None:
    """Raise `ModelDamaged` naming the first tensor that is missing, too many, or of another shape than the config's."""
    if not any(folder.glob("*.safetensors")):
        return  # weights in another format: whoever loads them checks them
    config = read_json(folder / "config.json")
    tensors = read_tensor_infos(folder)
    if (config.get("architectures") or [""])[0] not in _KNOWN or config.get("quantization_config"):
        return
    shape = shape_from_config(config, name=folder.name, bytes_per_param=2.0)
    for name, expected in _expected_tensors(shape, tensors):
        _check_tensor(folder, tensors, name, expected)
    _check_count(folder, tensors, "layers", shape.num_layers, "model.layers.")
    if shape.is_sparse and not _is_fused(tensors):
        for layer in range(shape.num_layers):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts."
            _check_count(folder, tensors, f"experts in layer {layer}", shape.num_experts, prefix)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; raises `ModelDamaged`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelDamaged(f"{path} cannot be read ({error.strerror}). Copy the whole checkpoint.") from error
    except ValueError as error:
        raise ModelDamaged(f"{path} is not JSON: {error}. Copy the checkpoint again.") from error
    if not isinstance(content, dict):
        raise ModelDamaged(f"{path} holds no JSON object. Copy the checkpoint again.")
    return content


def _expected_tensors(shape: ModelShape, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield _EMBEDDING, (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        stem = f"model.layers.{layer}"
        yield f"{stem}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{stem}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{stem}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{stem}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{stem}.input_layernorm.weight", (hidden,)
        yield f"{stem}.post_attention_layernorm.weight", (hidden,)
        if not shape.is_sparse:
            yield f"{stem}.mlp.gate_proj.weight", (wide, hidden)
            yield f"{stem}.mlp.up_proj.weight", (wide, hidden)
            yield f"{stem}.mlp.down_proj.weight", (hidden, wide)
        elif not _is_fused(tensors):
            yield from _expert_tensors(f"{stem}.block_sparse_moe", shape)
    yield "model.norm.weight", (hidden,)
    if not shape.tied_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def _expert_tensors(stem: str, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide = shape.hidden_size, shape.intermediate_size
    yield f"{stem}.gate.weight", (shape.num_experts, hidden)
    for expert in range(shape.num_experts):
        yield f"{stem}.experts.{expert}.w1.weight", (wide, hidden)
        yield f"{stem}.experts.{expert}.w2.weight", (hidden, wide)
        yield f"{stem}.experts.{expert}.w3.weight", (wide, hidden)


def _is_fused(tensors: Mapping[str, TensorInfo]) -> bool:
    """Experts of a layer in one tensor, as some tools save them; their layout is left to the loader."""
    return any(".experts.gate_up_proj" in name for name in tensors)


def _check_tensor(folder: Path, tensors: Mapping[str, TensorInfo], name: str, expected: tuple[int, ...]) -> None:
    if name not in tensors:
        raise ModelDamaged(f"{folder}: the config promises {name}, but the weights lack it. Copy the checkpoint again.")
    if tensors[name].shape != expected:
        raise ModelDamaged(
            f"{folder}: {name} has the shape {tensors[name].shape}, but the config says {expected}. "
            "The config and the weights are of different models."
        )


def _check_count(folder: Path, tensors: Mapping[str, TensorInfo], what: str, promised: int, prefix: str) -> None:
    """`prefix` is followed by a number in the names of the tensors."""
    numbers = {name[len(prefix) :].split(".", 1)[0] for name in tensors if name.startswith(prefix)}
    found = 1 + max((int(number) for number in numbers if number.isdecimal()), default=promised - 1)
    if found > promised:
        raise ModelDamaged(
            f"{folder}: the config says {promised} {what}, but the weights hold {found}. "
            "The config and the weights are of different models."
        )
