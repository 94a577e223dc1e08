"""llama.cpp's life: it is not healthy before its start, nor when it stopped, nor when it does not answer. And whose
prompt it computes first."""

import asyncio
from unittest import mock

import pytest

from cluster.engine import Engine, GenerationRequest, SamplingParams, Usage
from cluster.errors import EngineDead
from tests.cluster.engines.conftest import chat, make_local_engine

pytestmark = pytest.mark.integration


async def collect(engine: Engine) -> str:
    return "".join([chunk.text async for chunk in engine.generate(chat("Say hello.", max_tokens=4))])


async def test_health_raises_before_the_start_and_after_the_end() -> None:
    engine = make_local_engine("llamacpp")
    with pytest.raises(EngineDead):
        await engine.check_health()
    await engine.start()
    try:
        await engine.check_health()
        assert await collect(engine)
    finally:
        await engine.stop()
    await engine.stop()
    with pytest.raises(EngineDead):
        await engine.check_health()
    with pytest.raises(EngineDead):
        await collect(engine)


async def test_a_long_prompt_lets_a_short_one_go_first_and_keeps_what_it_has_computed() -> None:
    engine = make_local_engine("llamacpp", options={"n_batch": 64})
    await engine.start()
    sent = []
    try:
        server = engine._server  # type: ignore[attr-defined]
        with mock.patch.object(engine, "_server", mock.Mock(wraps=server)) as watched:
            ended = await two_prompts(engine, (504, 20))
            sent = watched.handle_completions.call_args_list
    finally:
        await engine.stop()
    assert [name for name, _ in ended] == ["short", "long"]
    assert {name: (usage.num_prompt_tokens, usage.num_cached_tokens) for name, usage in ended} == {
        "short": (20, 0),
        "long": (504, 0),
    }
    assert [len(call.args[0]["prompt"]) for call in sent].count(504) == 2, "it gave way once"


async def two_prompts(engine: Engine, lengths: tuple[int, int]) -> list[tuple[str, Usage]]:
    """The long one is there first. What came of each, in the order of their ends."""
    ended: list[tuple[str, Usage]] = []

    async def ask(name: str, first_id: int, length: int) -> None:
        ids = list(range(first_id, first_id + length))
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        chunks = [
            chunk async for chunk in engine.generate(GenerationRequest(name, prompt_token_ids=ids, sampling=sampling))
        ]
        assert chunks[-1].usage is not None
        ended.append((name, chunks[-1].usage))

    await asyncio.gather(ask("long", 1000, lengths[0]), ask("short", 2000, lengths[1]))
    return ended
