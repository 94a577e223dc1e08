"""Bytes of models, against published figures and arithmetic by hand."""

import pytest

from cluster.errors import ModelDamaged
from cluster.sizing import ModelShape, Parallelism, Workload, rank_bytes, shape_from_config

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
    assert MISTRAL.cached_tokens(32768) == 4096
    assert MIXTRAL.cached_tokens(32768) == 32768
    one = Parallelism()
    assert rank_bytes(MISTRAL, one, WORK).kv_cache == 4 * 4096 * MISTRAL.kv_bytes_per_token


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


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ModelDamaged, match="lacks num_hidden_layers"):
        shape_from_config({"hidden_size": 1}, name="x")
