"""Health raises when an engine is dead, and does not mistake a busy engine for one."""

import asyncio

import pytest

from cluster.engines import health_probe
from cluster.engines.health_probe import HealthProbe
from cluster.errors import EngineDead


async def test_an_engine_that_answers_is_healthy() -> None:
    questions = []

    async def ask() -> None:
        questions.append(1)

    probe = HealthProbe("It", ask)
    await probe.check()
    await probe.check()
    assert len(questions) == 2


async def test_an_engine_that_fails_is_dead_with_the_cause() -> None:
    async def ask() -> None:
        raise RuntimeError("no loop")

    with pytest.raises(EngineDead, match="It does not answer: no loop"):
        await HealthProbe("It", ask).check()


async def test_silence_is_fine_while_there_was_life_and_death_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_probe, "ANSWER_LIMIT_S", 0.0)
    num_questions = 0

    async def ask() -> None:
        nonlocal num_questions
        num_questions += 1
        await asyncio.Event().wait()

    probe = HealthProbe("It", ask)
    probe.note_life()
    await probe.check()
    monkeypatch.setattr(health_probe, "STALL_LIMIT_S", -1.0)
    with pytest.raises(EngineDead, match="no sign of life"):
        await probe.check()
    assert num_questions <= 1, "one question is out at a time"
    probe.close()
