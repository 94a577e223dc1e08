"""Whose prompt is computed next."""

from __future__ import annotations

import threading

from cluster.engines.llamacpp_turns import Prompt, Turns


def progress(processed: int, total: int = 1000) -> dict[str, int]:
    return {"total": total, "processed": processed, "cache": 0, "time_ms": 1}


def test_a_lone_prompt_never_gives_way() -> None:
    turns = Turns()
    prompt = turns.enter()
    assert [turns.note(prompt, progress(done)) for done in (256, 512, 768, 1000)] == [False] * 4


def test_who_comes_gets_a_batch_at_once_and_then_the_one_with_the_least_left_goes_on() -> None:
    turns = Turns()
    long = turns.enter()
    assert not turns.note(long, progress(256))
    longer, short = turns.enter(), turns.enter()
    assert turns.note(long, progress(512)), "nobody knows yet how much of those is cached"
    assert turns.note(longer, progress(256, 2000)), "it has more left than the one that gave way"
    assert not turns.note(short, progress(1900, 1910)), "nearly all of it was cached"
    turns.leave(short)
    assert turns.note(longer, progress(512, 2000))
    assert not turns.note(long, progress(768))
    turns.leave(long)
    assert not turns.note(longer, progress(768, 2000))


def test_equal_prompts_are_computed_one_after_the_other() -> None:
    turns = Turns()
    first, second = turns.enter(), turns.enter()
    assert turns.note(first, progress(256))
    assert turns.note(second, progress(256)), "as much is left of both"
    assert not turns.note(first, progress(512))


def waiting(turns: Turns, prompt: Prompt) -> threading.Thread:
    thread = threading.Thread(target=turns.wait, args=(prompt,), daemon=True)
    thread.start()
    return thread


def is_held(thread: threading.Thread) -> bool:
    """Whether it still waits, looked at long enough for one that would not."""
    thread.join(0.2)
    return thread.is_alive()


def test_who_gave_way_goes_on_when_the_shorter_ones_of_then_are_computed_whoever_came_later() -> None:
    turns = Turns()
    long, short, medium = (turns.enter() for _ in range(3))
    turns.note(long, progress(100))
    turns.note(medium, progress(500))
    thread = waiting(turns, long)
    turns.leave(short)
    assert is_held(thread), "the other one has less left"
    later = turns.enter()
    turns.leave(medium)
    thread.join(10)
    assert not thread.is_alive(), "it gets its next batch before those who came meanwhile"
    assert turns.note(long, progress(356)), "and then they get theirs"
    turns.leave(later)
    assert not turns.note(long, progress(612))


def test_who_turns_out_to_have_more_left_lets_the_waiting_one_go_on() -> None:
    turns = Turns()
    long, other = turns.enter(), turns.enter()
    turns.note(long, progress(512))
    thread = waiting(turns, long)
    assert is_held(thread)
    assert turns.note(other, progress(256, 5000))
    thread.join(10)
    assert not thread.is_alive()


def test_a_prompt_that_nobody_wants_any_more_neither_waits_nor_is_waited_for() -> None:
    turns = Turns()
    long, short = turns.enter(), turns.enter()
    turns.note(long, progress(512))
    thread = waiting(turns, long)
    assert is_held(thread)
    turns.leave(long)
    thread.join(10)
    assert not thread.is_alive()
    turns.leave(long)
    assert not turns.note(short, progress(1, 5000))
