"""llama.cpp's life: it is not healthy before its start, nor when it stopped, nor when it does not answer."""

import pytest

from cluster.engine import Engine
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
