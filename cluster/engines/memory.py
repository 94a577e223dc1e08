"""How much memory one replica takes, known before it starts: by the figures that the engines themselves start with.

What a model says of its cache comes from the header of its files; the weights are never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import ClusterError, ModelDamaged
from cluster.gguf_metadata import GgufMetadata, read_gguf_metadata
from cluster.sizing import (
    STEP_TOKENS,
    ModelShape,
    Parallelism,
    RankBytes,
    Workload,
    cached_tokens,
    rank_bytes,
    window_of,
)

MIB = 2**20
GIB = 2**30
DEFAULT_CONTEXT = 4096
"""Of a GGUF file that does not say for how long a context it was trained."""
# vLLM measures free GPU memory itself; on a CPU it would take most of the machine.
_CPU_CACHE_SHARE = 0.25
# Beside the weights as they lie in the file: those that llama.cpp puts in another order for the CPU, vLLM's loading.
_LOADED = 1.2
# Measured, with Ray's part of the process, the scratch space of a computation and the cache of former prompts.
_LLAMACPP_RUNTIME = 600 * MIB
VLLM_RUNTIME = 2 * GIB
"""What the processes of one rank of vLLM hold beside the model."""
_VLLM_STEP = 512 * MIB
# With a GPU, where weights and cache lie on it: pinned buffers, the loading of the weights.
_VLLM_WORK_BESIDE_GPU = 4 * GIB
# Of a model whose header does not tell, and in whose place neither engine could tell more.
_UNKNOWN_CACHE = {"llamacpp": 800 * MIB, "vllm": 4 * GIB}


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a model says of its key-value cache: bytes of one token in half precision, the tokens that it was trained
    for, and those that each layer sees where that is fewer. `None`: it does not say."""

    bytes_per_token: int | None
    trained_context: int | None
    window: int | None = None


def facts_of_gguf(path: Path) -> CacheFacts:
    """Raises `ModelDamaged`."""
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise ModelDamaged(f"{path} does not exist. Prepare the model again or correct its path.") from error
    return _facts_of_gguf(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _facts_of_gguf(path: Path, _num_bytes: int, _changed_ns: int) -> CacheFacts:
    """Kept, since large vocabularies take their time to be passed over."""
    return facts_of_metadata(read_gguf_metadata(path))


def facts_of_metadata(metadata: GgufMetadata) -> CacheFacts:
    values = metadata.num_cached_values_per_token
    return CacheFacts(None if values is None else 2 * values, metadata.max_context)


def facts_of_shape(shape: ModelShape) -> CacheFacts:
    return CacheFacts(shape.kv_bytes_per_token, shape.max_context, shape.sliding_window)


def facts_of_config(config: Mapping[str, Any], *, num_ranks: int = 1) -> CacheFacts:
    """Of a checkpoint's config.json. Ranks share the key-value heads out as long as there are enough."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    width = config.get("head_dim") or (config["hidden_size"] // heads if heads and "hidden_size" in config else None)
    trained = config.get("max_position_embeddings")
    if not layers or not heads or not width:
        return CacheFacts(None, trained)
    kv_heads = -(-(config.get("num_key_value_heads") or heads) // num_ranks)
    return CacheFacts(2 * 2 * layers * kv_heads * width, trained, window_of(config))


def read_model_config(folder: Path) -> Mapping[str, Any]:
    """A checkpoint's config.json; of its text part, where it has several. Raises `ModelDamaged`."""
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelDamaged(f"{file} cannot be read ({error}). Prepare or copy the model again.") from error
    return {**config, **config.get("text_config", {})}


def context_of(model: str, wanted: int | None, trained: int | None) -> int | None:
    """Tokens of prompt and answer that the engine makes room for. Raises `ClusterError` where the model cannot."""
    if wanted is not None and trained is not None and wanted > trained:
        raise ClusterError(
            f"max_context of {model} is {wanted}, but the model was trained for {trained} tokens. "
            f"Set max_context to {trained} or less."
        )
    return wanted or trained


def llamacpp_bytes(facts: CacheFacts, *, weights: int, context: int, num_slots: int) -> RankBytes:
    """Each slot has the whole context from the start."""
    cache = _UNKNOWN_CACHE["llamacpp"]
    if facts.bytes_per_token is not None:
        cache = context * num_slots * facts.bytes_per_token
    return RankBytes(int(_LOADED * weights), cache, activations=0, runtime=_LLAMACPP_RUNTIME)


def vllm_bytes(
    facts: CacheFacts,
    *,
    weights: int,
    context: int | None,
    num_slots: int,
    dtype: str | None,
    uses_gpu: bool,
    shape: ModelShape | None = None,
) -> RankBytes:
    """Main memory of a model that is not cut: on a CPU the sum of a rank where its `shape` is known."""
    loaded = int(_LOADED * weights)
    if uses_gpu:
        return RankBytes(loaded, 0, activations=_VLLM_WORK_BESIDE_GPU, runtime=VLLM_RUNTIME)
    cache = _UNKNOWN_CACHE["vllm"]
    if facts.bytes_per_token is not None:
        cache = vllm_cpu_cache_bytes(
            facts.bytes_per_token, facts.window, context=context or 0, num_slots=num_slots, dtype=dtype
        )
    if shape is None:
        return RankBytes(loaded, cache, activations=_VLLM_STEP, runtime=VLLM_RUNTIME)
    work = Workload(context or shape.max_context, (num_slots + 1) // 2)
    needs = rank_bytes(shape.in_dtype(dtype), Parallelism(), work, is_on_cpu=True)
    return replace(needs, kv_cache=cache, runtime=VLLM_RUNTIME)


def vllm_cpu_cache_bytes(
    bytes_per_token: int,
    window: int | None,
    *,
    context: int,
    num_slots: int,
    dtype: str | None,
    step_tokens: int = STEP_TOKENS,
    num_ranks: int = 1,
) -> int:
    """Of one rank: room for half of all contexts at their full length, within a share of the machine, but for one in
    any case. vLLM keeps float32 weights in half precision unless `dtype` says otherwise."""
    if dtype in ("float32", "float"):
        bytes_per_token *= 2
    one, half = (
        cached_tokens(contexts, context, window, step_tokens, is_on_cpu=True) * bytes_per_token
        for contexts in (1, (num_slots + 1) // 2)
    )
    share = int(psutil.virtual_memory().total * _CPU_CACHE_SHARE) // num_ranks
    return max(one, min(half, share))
