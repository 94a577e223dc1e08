"""What the latest answers of a model took: tokens, time of a slot for each, and time to the first token.

For one event loop. Pure but for the clock that is given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

# Weight of the latest answer in each mean.
_NEWS = 0.1
_REMEMBERED_FIRST_TOKENS = 64


class AnswerPace:
    """Means over the latest answers, the newest counting most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.answer_s = 1.0
        """Seconds from the beginning of an answer to its end."""
        self.answer_tokens = 0.0
        """Tokens of an answer, without those of its prompt."""
        self._tokens = 0.0
        self._seconds = 0.0
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED_FIRST_TOKENS)

    @property
    def seconds_per_token(self) -> float | None:
        """Time of one slot for one token of prompt or answer; none before the first answer."""
        return self._seconds / self._tokens if self._tokens else None

    def note_answer(self, prompt_tokens: float, answer_tokens: float, seconds: float) -> None:
        """An answer has ended or was cut."""
        self.answer_s += _NEWS * (seconds - self.answer_s)
        if not answer_tokens:
            return
        news = _NEWS if self._tokens else 1.0
        self.answer_tokens += news * (answer_tokens - self.answer_tokens)
        self._tokens += news * (prompt_tokens + answer_tokens - self._tokens)
        self._seconds += news * (seconds - self._seconds)

    def note_first_token(self, seconds: float) -> None:
        """A request saw its first token after so many seconds."""
        self._first_tokens.append((self._clock(), seconds))

    def first_tokens(self) -> Sequence[tuple[float, float]]:
        """(age, time to the first token) in seconds, of the latest requests."""
        now = self._clock()
        return [(now - at, seconds) for at, seconds in self._first_tokens]
