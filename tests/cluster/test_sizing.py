"""Bytes of models, against published figures and arithmetic by hand."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import ModelDamaged
from cluster.sizing import (
    ModelShape,
    Parallelism,
    Workload,
    cached_tokens,
    rank_bytes,
    shape_from_config,
    window_of,
)

MIXTRAL = ModelShape("mixtral-8x7b", 32, 4096, 14336, 32, 8, 128, 32000, 32768, 8, 2)
MISTRAL = ModelShape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32000, 32768, sliding_window=4096)
LLAMA_70B = ModelShape("llama-2-70b", 80, 8192, 28672, 64, 8, 128, 32000, 4096)
WORK = Workload(context=32768, num_sequences=4, batch_tokens=8192)


def test_parameters_are_the_published_ones() -> None:
    assert MIXTRAL.total_params == pytest.approx(46.7e9, rel=0.001)
    assert MIXTRAL.active_params == pytest.approx(12.9e9, rel=0.003)
    assert MISTRAL.total_params == pytest.approx(7.24e9, rel=0.001)
    assert LLAMA_70B.total_params == pytest.approx(69e9, rel=0.001)


def test_grouped_query_attention_caches_key_value_heads_only() -> None:
    assert MIXTRAL.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2


def test_the_sliding_window_bounds_the_cache_of_a_sequence() -> None:
    def tokens(num: int, context: int, window: int | None) -> int:
        return cached_tokens(num, context, window, 2048, is_on_cpu=True)

    assert tokens(3, 32768, None) == 3 * (32768 + 256)
    assert tokens(3, 32768, 4096) == 3 * (4096 + 256) + 2 * 2048
    assert tokens(1, 6000, 4096) == 6000 + 256
    assert tokens(1, 2000, 4096) == 2000 + 256
    assert cached_tokens(3, 32768, None, 2048, is_on_cpu=False) == 3 * (32768 + 32)
    one = Parallelism()
    assert rank_bytes(MISTRAL, one, WORK).kv_cache == (4 * (4096 + 32) + 2 * 8192) * MISTRAL.kv_bytes_per_token
    assert rank_bytes(MIXTRAL, one, WORK).kv_cache == 4 * (32768 + 32) * MIXTRAL.kv_bytes_per_token


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "model_type": "mistral"}, 4096),
        ({"sliding_window": None, "model_type": "mixtral"}, None),
        ({"sliding_window": 4096, "model_type": "gemma2"}, None),
        ({"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, None),
        ({"sliding_window": 4096, "layer_types": ["sliding_attention"] * 2}, 4096),
    ],
)
def test_a_window_counts_only_where_all_layers_have_it(config: dict[str, Any], window: int | None) -> None:
    assert window_of(config) == window


TINY = ModelShape("t", 2, 8, 16, 4, 2, 2, 100, 64)
"""Attention: 8 x 8 queries and as many for the output, 8 x 4 keys and as many values: 192 numbers in each layer."""


def test_activations_are_those_of_one_step_by_hand() -> None:
    """For each of 10 tokens: 2 x 8 of the residual stream, (4 + 2 x 2) x 2 of attention, 2 x 16 of each expert."""
    work = Workload(64, num_sequences=3, batch_tokens=10)

    def activations(shape: ModelShape, parallel: Parallelism) -> int:
        return rank_bytes(shape, parallel, work).activations

    mixture = replace(TINY, num_experts=4, experts_per_token=2)
    assert activations(TINY, Parallelism()) == 2 * 10 * (16 + 16 + 32) + 4 * 3 * 100
    assert activations(TINY, Parallelism(tensor=2)) == 2 * 10 * (16 + 8 + 16) + 4 * 3 * 50
    assert activations(mixture, Parallelism()) == 2 * 10 * (16 + 16 + 2 * 32) + 4 * 3 * 100
    spread = Parallelism(data=2, is_expert_parallel=True)
    assert activations(mixture, spread) == 2 * 10 * (16 + 16 + 2 * 32) + 4 * 3 * 100
    both = Parallelism(tensor=2, data=2, is_expert_parallel=True)
    assert activations(mixture, both) == 2 * 10 * (16 + 8 + 2 * 32) + 4 * 3 * 50
    assert activations(TINY.in_dtype("float32"), Parallelism()) == 4 * 10 * (16 + 16 + 32) + 4 * 3 * 100


def test_on_cpus_linear_layers_count_in_float32() -> None:
    work = Workload(64)

    def copies(shape: ModelShape, parallel: Parallelism) -> int:
        return rank_bytes(shape, parallel, work, is_on_cpu=True).weights - rank_bytes(shape, parallel, work).weights

    mixture = replace(TINY, num_experts=4, experts_per_token=2)
    ends = 2 * 100 * 8
    assert copies(TINY, Parallelism()) == 2 * 2 * (192 + 3 * 8 * 16) + 4 * ends
    assert copies(mixture, Parallelism(data=2, is_expert_parallel=True)) == 2 * 2 * (192 + 8 * 4) + 4 * ends
    assert copies(replace(mixture, tied_embeddings=True), Parallelism()) == 2 * 2 * (192 + 8 * 4) + 4 * ends
    halves = 2 * 2 * (96 + 3 * 8 * 8) + 4 * ends // 2
    assert copies(TINY, Parallelism(tensor=2)) == halves
    assert copies(TINY.in_dtype("float32"), Parallelism()) == 0
    assert copies(replace(TINY, bytes_per_param=0.6), Parallelism()) == 0


def test_an_engine_that_computes_in_float32_takes_twice_as_much() -> None:
    half, full = (rank_bytes(TINY.in_dtype(dtype), Parallelism(), Workload(64)) for dtype in ("auto", "float32"))
    assert (full.weights, full.kv_cache) == (2 * half.weights, 2 * half.kv_cache)
    assert full.activations > half.activations
    assert replace(TINY, bytes_per_param=0.6).in_dtype("float").bytes_per_param == 0.6


def test_expert_parallel_ranks_hold_their_experts_whole() -> None:
    one = rank_bytes(MIXTRAL, Parallelism(), WORK)
    four = rank_bytes(MIXTRAL, Parallelism(data=4, is_expert_parallel=True), WORK)
    saved = 32 * 6 * MIXTRAL.expert_params * 2
    assert one.weights - four.weights == saved
    assert four.kv_cache == one.kv_cache // 4


def test_tensor_parallel_ranks_share_heads_and_copy_key_value_heads_when_there_are_too_few() -> None:
    eight = rank_bytes(LLAMA_70B, Parallelism(tensor=8), Workload(4096))
    sixteen = rank_bytes(LLAMA_70B, Parallelism(tensor=16), Workload(4096))
    assert sixteen.kv_cache == eight.kv_cache
    assert sixteen.weights < eight.weights


def test_redundant_experts_cost_their_bytes() -> None:
    parallel = Parallelism(data=4, is_expert_parallel=True)
    plain = rank_bytes(MIXTRAL, parallel, WORK)
    more = rank_bytes(MIXTRAL, parallel, WORK, num_experts_here=3)
    assert more.weights - plain.weights == 32 * MIXTRAL.expert_params * 2


def test_a_config_gives_the_shape() -> None:
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "torch_dtype": "bfloat16",
    }
    assert shape_from_config(config, name="mixtral-8x7b") == MIXTRAL
    loaded_in_half = shape_from_config(config | {"torch_dtype": "float32"}, name="mixtral-8x7b")
    assert loaded_in_half == MIXTRAL


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ModelDamaged, match="lacks num_hidden_layers"):
        shape_from_config({"hidden_size": 1}, name="x")
