"""How many tokens the running requests of an engine hold in its KV cache. Used from one event loop only.

Counted here, from prompts and tokens as they come: what remains in the cache of requests that have ended makes room
when it is needed and is no load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CacheUse:
    """`num_tokens` of at most `max_tokens`; 0 of 0: not known."""

    def __init__(self, max_tokens: int = 0) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0

    @contextmanager
    def hold(self, num_tokens: int) -> Iterator[HeldTokens]:
        """Around one request: its prompt, then what is added for each token of its answer."""
        held = HeldTokens(self)
        held.add(num_tokens)
        try:
            yield held
        finally:
            self.num_tokens -= held.num_tokens


class HeldTokens:
    """What one request holds."""

    def __init__(self, use: CacheUse) -> None:
        self._use = use
        self.num_tokens = 0

    def add(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self._use.num_tokens += num_tokens
