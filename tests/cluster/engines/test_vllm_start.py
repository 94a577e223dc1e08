"""The cache that vLLM gets on a CPU is the one that the plan counts, and as much as vLLM itself wants for a context."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.engines.parallelism import Parallelism
from cluster.engines.settings import EngineSettings
from cluster.engines.vllm_start import _cpu_cache_bytes
from cluster.sizing import Parallelism as Sizes
from cluster.sizing import Workload, cached_tokens, rank_bytes, shape_from_config

CONFIG: dict[str, Any] = {
    "model_type": "mistral",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 32768,
}


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"max_num_batched_tokens": 512}])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("tensor", [1, 2])
def test_an_engine_reserves_what_the_plan_counts(options: dict[str, Any], window: int | None, tensor: int) -> None:
    config = CONFIG | {"sliding_window": window}
    settings = EngineSettings(
        "m", "folder", parallel_requests=5, options=options, parallelism=Parallelism(tensor_parallel_size=tensor)
    )
    shape = shape_from_config(config, name="m").in_dtype(options.get("dtype"))
    work = Workload(8192, 3, options.get("max_num_batched_tokens", 2048))
    planned = rank_bytes(shape, Sizes(tensor=tensor), work, is_on_cpu=True).kv_cache
    assert _cpu_cache_bytes(settings, config, 8192) == planned


@pytest.mark.requires("vllm")
@pytest.mark.parametrize(("block", "is_on_cpu"), [(128, True), (16, False)])
@pytest.mark.parametrize("context", [100, 3000, 32768])
def test_vllm_wants_no_more_for_a_window_than_is_reserved(context: int, block: int, is_on_cpu: bool) -> None:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    spec = SlidingWindowSpec(block_size=block, num_kv_heads=1, head_size=16, dtype=torch.bfloat16, sliding_window=64)
    blocks = spec.max_admission_blocks_per_request(2 * 2048, context)
    assert blocks * block <= cached_tokens(1, context, 64, 2048, is_on_cpu=is_on_cpu) < (blocks + 2) * block
