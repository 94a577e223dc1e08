"""A model that says what a test wants, and remembers what it was asked: for what a real model cannot do on demand."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence

from cluster.engine import GenerationChunk, GenerationRequest, Usage


class ScriptedModel:
    """Says one text after the other, in small pieces; repeats the last one. A token is a word."""

    def __init__(
        self, *turns: str, max_context: int = 4096, template_knows_tools: bool = False, finish_reason: str = "stop"
    ) -> None:
        self._turns = list(turns)
        self._max_context = max_context
        self._template_knows_tools = template_knows_tools
        self._finish_reason = finish_reason
        self.requests: list[GenerationRequest] = []
        self.num_cancelled = 0

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def template_knows_tools(self) -> bool:
        return self._template_knows_tools

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        text = self._turns[min(len(self.requests), len(self._turns) - 1)]
        self.requests.append(request)
        pieces = re.findall(r".{1,7}", text, re.DOTALL)
        try:
            for piece in pieces:
                yield GenerationChunk(text=piece, token_ids=(1,))
        except GeneratorExit:
            self.num_cancelled += 1
            raise
        usage = Usage(await self.count_tokens(request), len(pieces))
        yield GenerationChunk(finish_reason=self._finish_reason, usage=usage)  # type: ignore[arg-type]

    async def count_tokens(self, request: GenerationRequest) -> int:
        return sum(len(str(message.get("content") or "").split()) + 1 for message in request.messages or ())

    @property
    def prompts(self) -> list[Sequence[dict[str, object]]]:
        return [list(request.messages or ()) for request in self.requests]  # type: ignore[arg-type]
