"""A plan with copies of experts becomes vLLM's own balancer, and its figures name no ranks that nobody knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.engines.expert_balancer import (
    BALANCED_ARCHITECTURES,
    balancer_options,
    check_balanced,
    is_balanced,
    num_redundant_experts,
)
from cluster.engines.parallelism import Parallelism
from cluster.engines.vllm_experts import OutputCounts
from cluster.errors import LoadError, PlanError
from cluster.expert_load import ExpertLoad, sum_loads

GANG = Parallelism(data_parallel_size=4, data_parallel_rpc_port=5000, enable_expert_parallel=True)
CONFIG = {"num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2}


def test_copies_become_the_options_of_vllms_balancer() -> None:
    assert balancer_options(4) == {"enable_eplb": True, "eplb_config": {"num_redundant_experts": 4}}
    given = {"dtype": "bfloat16", "eplb_config": {"step_interval": 500}}
    assert balancer_options(0, given) == {
        "dtype": "bfloat16",
        "enable_eplb": True,
        "eplb_config": {"step_interval": 500, "num_redundant_experts": 0},
    }
    assert given == {"dtype": "bfloat16", "eplb_config": {"step_interval": 500}}


@pytest.mark.requires("vllm")
def test_vllm_reads_these_options(tmp_path: Path) -> None:
    """The folder is there: an engine that ran in this process before has left vLLM offline."""
    from vllm.engine.arg_utils import EngineArgs

    read = EngineArgs(model=str(tmp_path), **balancer_options(4), **GANG.engine_arguments())
    assert (read.enable_eplb, read.eplb_config.num_redundant_experts) == (True, 4)
    assert (read.enable_expert_parallel, read.data_parallel_size) == (True, 4)


@pytest.mark.requires("vllm")
def test_the_kinds_whose_experts_are_balanced_are_vllms() -> None:
    from vllm.model_executor.models.interfaces import MixtureOfExperts
    from vllm.model_executor.models.mixtral import MixtralForCausalLM
    from vllm.model_executor.models.phimoe import PhiMoEForCausalLM
    from vllm.model_executor.models.registry import ModelRegistry

    assert set(ModelRegistry.get_supported_archs()) >= BALANCED_ARCHITECTURES
    for kind in (MixtralForCausalLM, PhiMoEForCausalLM):
        assert (MixtureOfExperts in kind.__mro__) == (kind.__name__ in BALANCED_ARCHITECTURES)
    check_balanced("m", ["MixtralForCausalLM"])
    with pytest.raises(PlanError, match=r"does not know models of the kind PhiMoEForCausalLM, as m is\. Set expert_pl"):
        check_balanced("m", ["PhiMoEForCausalLM"])


@pytest.mark.parametrize("given", [{"enable_eplb": False}, {"eplb_config": {"num_redundant_experts": 8}}])
def test_options_that_contradict_the_plan_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="set expert_placement: linear"):
        balancer_options(4, given)


def test_copies_count_only_where_the_balancer_is_on() -> None:
    assert (is_balanced(balancer_options(4)), num_redundant_experts(balancer_options(4))) == (True, 4)
    without = {"eplb_config": {"num_redundant_experts": 4}}
    assert (is_balanced(without), num_redundant_experts(without)) == (False, 0)


def test_ranks_must_divide_the_experts_with_their_copies() -> None:
    model = {"num_layers": 2, "num_experts": 8, "num_heads": 12, "num_kv_heads": 4}
    GANG.check(**model, num_redundant_experts=4)
    twelve = replace(GANG, data_parallel_size=12)
    twelve.check(**model, num_redundant_experts=4)
    with pytest.raises(PlanError, match="12 ranks are more than the model's 8 experts"):
        twelve.check(**model)
    with pytest.raises(PlanError, match="10 experts with their copies cannot be spread evenly over 4 ranks"):
        GANG.check(**model, num_redundant_experts=2)


def counted(*, is_balanced: bool) -> ExpertLoad:
    counts = OutputCounts(GANG, CONFIG, is_balanced=is_balanced)
    counts.note(np.array([[[0, 1], [6, 7]]] * 10, np.int16))
    return counts.load()


def test_tokens_that_were_in_the_cache_count_once() -> None:
    counts = OutputCounts(GANG, CONFIG)
    shared, rest = [[0, 1], [6, 7]], [[2, 3], [4, 5]]
    counts.note(np.array([shared] * 16 + [rest] * 3, np.int16), num_cached=0)
    counts.note(np.array([shared] * 16 + [rest] * 4, np.int16), num_cached=16)
    assert counts.load().tokens.tolist() == [[16, 16, 7, 7, 0, 0, 0, 0], [0, 0, 0, 0, 7, 7, 16, 16]]


def test_figures_per_rank_are_given_only_where_experts_stay_where_they_are() -> None:
    fixed, moving = counted(is_balanced=False), counted(is_balanced=True)
    assert fixed.rank_tokens().tolist() == [[20, 0, 0, 0], [0, 0, 0, 20]]
    assert moving.tokens.tolist() == fixed.tokens.tolist()
    assert moving.rank_tokens().shape == (2, 0)
    assert not len(moving.imbalance())
    assert ExpertLoad.from_json(moving.to_json()).is_balanced
    assert sum_loads([moving, moving]).is_balanced
    with pytest.raises(LoadError, match="place the experts differently"):
        sum_loads([moving, replace(moving, is_balanced=False)])
    with pytest.raises(LoadError, match="no ranks can be named"):
        replace(fixed, is_balanced=True)
