"""The short form of the chaos on real engines: one trial with llama.cpp."""

import pytest

from tests.chaos.engines import replicas_of, run_trial

pytestmark = pytest.mark.integration


async def test_llamacpp_answers_go_on_when_their_process_is_killed() -> None:
    async with replicas_of("llamacpp") as (replicas, pool):
        verdict = await run_trial(replicas, pool)
    assert verdict.has_passed("llamacpp"), verdict
    assert verdict.num_moved >= 1
