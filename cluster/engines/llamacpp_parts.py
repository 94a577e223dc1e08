"""A long prompt is given to llama.cpp in parts, between which the prompts of other slots have their turn.

llama.cpp fills its batches with the prompt of one slot before it looks at the next slot, so a short prompt would wait
until a long one is done. A part is a request of its own for the beginning of the prompt, of which nothing but the
computed keys and values is wanted: they stay in the slot, where the next part finds them. What is cached already makes
no parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OnItem = Callable[[Any], bool]
"""Hears what llama.cpp says of a request; true ends the request."""
Handle = Callable[[dict[str, Any], OnItem], None]
"""Runs a request until it ends. Blocks."""


def complete_in_parts(handle: Handle, size: int, body: dict[str, Any], on_item: OnItem) -> None:
    """`handle(body, on_item)` for a prompt of token ids, no more than `size` of them computed at once."""
    run = _Run(len(body["prompt"]), size, on_item)
    handle(body, run.begin)
    if run.num_done is None:
        return
    for end in range(run.num_done + size, run.num_tokens, size):
        if not run.is_over:
            handle(_part(body, end), run.go_on)
    if not run.is_over:
        handle(body, on_item)


def _part(body: dict[str, Any], end: int) -> dict[str, Any]:
    kept = {name: body[name] for name in ("stream", "return_progress", "cache_prompt")}
    return {**kept, "prompt": body["prompt"][:end], "max_tokens": 0}


class _Run:
    """One prompt on its way."""

    def __init__(self, num_tokens: int, size: int, on_item: OnItem) -> None:
        self.num_tokens = num_tokens
        self._size = size
        self._on_item = on_item
        self.num_done: int | None = None
        """Tokens that were computed or cached when it was found too long to be computed at once; none: it is not."""
        self.is_over = False
        """Nobody wants the answer any more, or it failed."""

    def begin(self, item: Any) -> bool:
        """The whole request, which is taken back at once where too much of its prompt is left."""
        self.is_over = self._on_item(item)
        if "prompt_progress" in item:
            num_done = item["prompt_progress"]["processed"]
            if self.num_tokens - num_done > self._size:
                self.num_done = num_done
                return True
        return self.is_over

    def go_on(self, item: Any) -> bool:
        """A part, of which only its progress and its failure are told."""
        if "error" in item:
            self._on_item(item)
            self.is_over = True
        elif "prompt_progress" in item:
            self.is_over = self._on_item(item)
        return self.is_over
