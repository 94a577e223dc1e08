"""Counts the tokens of one request while it runs, so that also a stream that is cut is booked with what it used."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engine import Usage


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request may use, told before a model has seen it."""

    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0

    @property
    def total(self) -> int:
        return self.num_prompt_tokens + self.num_answer_tokens


class TokenMeter:
    """Over all generations of one request (tools take several). While one runs, its prompt counts as estimated; when it
    has ended, its usage replaces what was counted."""

    def __init__(self, num_prompt_tokens: int = 0) -> None:
        self._estimated_prompt = num_prompt_tokens
        self._finished = 0
        self._running = 0
        self.num_answer_tokens = 0
        """All that came out so far."""

    def begin(self) -> None:
        """A model took the request."""
        self._running = self._estimated_prompt

    def add(self, num_tokens: int) -> None:
        self._running += num_tokens
        self.num_answer_tokens += num_tokens

    def finish(self, usage: Usage) -> None:
        self._running = 0
        self._finished += usage.num_prompt_tokens + usage.num_completion_tokens

    def total(self, *, has_failed: bool = False) -> int:
        """Tokens to book. A request that failed before its first token is booked with none."""
        if has_failed and not self._finished and not self.num_answer_tokens:
            return 0
        return self._finished + self._running
