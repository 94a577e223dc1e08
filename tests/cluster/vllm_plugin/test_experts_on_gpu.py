"""A mixture on one GPU: exact in float32 against single-process Transformers, and counted as its routers chose."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.engines.parallelism import Parallelism
from tests.cluster.vllm_plugin.small_mixtures import ANSWER, SHORT, engine, prompts
from tests.engine_process import Replica
from tests.expert_oracle import Reference

pytestmark = [pytest.mark.gpu, pytest.mark.integration, pytest.mark.requires("gpu", "vllm"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "compiled"])
def counted(distinct: Path, request: pytest.FixtureRequest) -> Iterator[Replica]:
    with engine(distinct, Parallelism(count_experts=True), enforce_eager=request.param) as made:
        yield made


def test_answers_are_exact_and_counts_are_what_transformers_routes(counted: Replica, oracle: Reference) -> None:
    answers = counted.generate(SHORT, ANSWER)
    assert oracle.judge(SHORT, answers).differences == []
    assert len({tuple(answer) for answer in answers}) == len(SHORT), "answers that are all alike show nothing"
    (load,) = counted.loads()
    assert load.tokens.tolist() == oracle.routed(SHORT, answers)


def test_what_was_in_the_cache_is_not_counted_again(counted: Replica, oracle: Reference) -> None:
    """vLLM keeps whole blocks of 16 tokens, and computes a prompt's last token always."""
    (long,) = prompts(1, 40)
    (first,) = counted.generate([long], 1)
    (before,) = counted.loads()
    (second,) = counted.generate([long], 1)
    (after,) = counted.loads()
    assert second == first
    again = (after.tokens - before.tokens).sum(axis=1)
    assert again.tolist() == [2 * (40 - 32)] * len(again)
