"""Calls to other parts of windfarm: they wait while a part is replaced by its next version, and for nothing else."""

import asyncio
from typing import Any

import pytest

from services.calls import ServeCalls
from services.errors import ApiError


class Part:
    """Stands for a handle of Serve and for what Serve says of its application."""

    def __init__(self, *, is_there: bool = False, is_changing: bool = False) -> None:
        self.is_there = is_there
        self.is_changing = is_changing
        self.asked: list[str] = []
        self.search = self

    async def remote(self, query: str) -> str:
        assert self.is_there
        self.asked.append(query)
        return f"found {query}"

    def calls(self, **options: Any) -> ServeCalls:
        return ServeCalls(
            self, lambda: None if self.is_there else "It is not there.", is_changing=lambda: self.is_changing, **options
        )


async def test_a_call_waits_until_the_next_version_is_there() -> None:
    part = Part(is_changing=True)
    asked = asyncio.create_task(part.calls().call("search", "badge"))
    await asyncio.sleep(0.3)
    assert not asked.done()
    part.is_there, part.is_changing = True, False
    assert await asked == "found badge"


@pytest.mark.parametrize("is_changing", [False, True])
async def test_what_does_not_come_is_503_with_the_reason(is_changing: bool) -> None:
    part = Part(is_changing=is_changing)
    with pytest.raises(ApiError, match="It is not there") as refused:
        await part.calls(change_wait_s=0.2).call("search", "badge")
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (503, "not_ready", 5)
    assert part.asked == []


async def test_only_an_answer_is_told() -> None:
    part, told = Part(), list[str]()
    calls = part.calls(on_answer=lambda: told.append("answer"))
    with pytest.raises(ApiError):
        await calls.call("search", "badge")
    assert told == []
    part.is_there = True
    await calls.call("search", "badge")
    assert told == ["answer"]


async def test_what_lasts_gets_more_time() -> None:
    class Slow:
        async def remote(self) -> str:
            await asyncio.sleep(0.2)
            return "done"

    part = Part(is_there=True)
    part.search = part.tune = Slow()  # type: ignore[assignment,attr-defined]
    calls = part.calls(timeout_s=0.01)
    with pytest.raises(ApiError, match="No answer within") as late:
        await calls.call("search")
    assert (late.value.status, late.value.code) == (503, "timeout")
    assert await calls.call("tune") == "done"


async def test_without_a_change_nobody_waits() -> None:
    part = Part()
    asked = asyncio.create_task(part.calls().call("search", "badge"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert asked.done()
    with pytest.raises(ApiError):
        await asked
