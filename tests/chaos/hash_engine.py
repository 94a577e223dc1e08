"""An engine whose next token is a hash of its prefix: whatever is lost, doubled or begun again changes what follows.

It keeps the contract of every engine, with what is hard in it: characters cut between tokens, bytes that are no text,
an end token that the client's ids hold, stop strings, log-probabilities, chunks of any size. Faults are methods.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import json
import random
from collections.abc import AsyncIterator, Sequence

from cluster.engine import (
    EngineLoad,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from cluster.engines.request_checks import answer_limit, check_request
from cluster.engines.resumption import catch_up, delivered_of
from cluster.engines.stop_strings import StopMatcher
from cluster.errors import CannotContinue, EngineDead
from cluster.expert_load import ExpertLoad

MAX_CONTEXT = 4096
_CUT = [character.encode() for character in "é漢字😀ßı"]
_WHOLE = [
    b" the",
    b" of",
    b"\n",
    b'"',
    b"\\",
    b"ST",
    b"OP",
    b" a",
    b"}",
    b"\xe2\x80\xa8",
    b"0",
    b".",
    b" na\xc3\xafve",
    b"\xff",
]
VOCABULARY: tuple[bytes, ...] = (b"", *(part for c in _CUT for part in (c[:1], c[1:])), *_WHOLE)
END = 0
_FIRST_WHOLE = 1 + 2 * len(_CUT)


class HashEngine:
    """`pace_s` is the mean time between two chunks. `num_slots` is what it tells; it counts nobody."""

    def __init__(
        self,
        *,
        model: str = "tiny",
        pace_s: float = 0.0,
        max_context: int = MAX_CONTEXT,
        num_slots: int = 1000,
        identity: str = "",
    ) -> None:
        self.info = ModelInfo(
            model,
            "hash",
            max_context=max_context,
            max_concurrency=num_slots,
            continues_answers=True,
            identity=identity,
        )
        self.num_tokens = 0
        """Sampled by this engine, over all answers."""
        self.pace_s = pace_s
        self._num_running = 0
        self._runs = asyncio.Event()
        self._runs.set()
        self._is_dead = False

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(self._num_running, 0)

    def die(self) -> None:
        """All answers fail, and so does the check of its health."""
        self._is_dead = True
        self._runs.set()

    def hang(self) -> None:
        """No answer goes on, and nothing says why."""
        self._runs.clear()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def check_health(self) -> None:
        if self._is_dead:
            raise EngineDead("The engine's process has ended.")

    async def expert_load(self) -> ExpertLoad | None:
        return None

    async def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        return len(prompt_ids(request))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        check_request(request)
        answer = HashAnswer(request, self.info.max_context)
        self._num_running += 1
        try:
            if chunk := answer.catch_up():
                yield chunk
            while answer.finish_reason is None:
                await self._wait()
                before = answer.num_tokens
                yield answer.next(random.choice((1, 1, 1, 2, 4)))
                self.num_tokens += answer.num_tokens - before
            yield answer.last()
        finally:
            self._num_running -= 1

    async def _wait(self) -> None:
        if self.pace_s:
            await asyncio.sleep(random.uniform(0, 2 * self.pace_s))
        await self._runs.wait()
        if self._is_dead:
            raise EngineDead("The engine's process has ended.")


class HashAnswer:
    """One answer, from its beginning or from what was delivered."""

    def __init__(self, request: GenerationRequest, max_context: int = MAX_CONTEXT) -> None:
        sampling = request.sampling
        self._sampling = sampling
        self._delivered = delivered_of(request)
        if self._delivered.token_ids and sampling.json_schema is not None:
            raise CannotContinue("The hash engine cannot bring a grammar to the middle of an answer.")
        prompt = prompt_ids(request)
        self._num_prompt_tokens = len(prompt)
        self._limit = answer_limit(len(prompt), sampling.max_tokens, max_context)
        self._state = _digest(b"", *prompt, *((sampling.seed or 0,) if sampling.temperature else ()))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopMatcher(sampling.stop)
        self._last_id = END
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def catch_up(self) -> GenerationChunk | None:
        """Go over what was delivered; the text of it that is due."""
        pieces = []
        for token_id in self._delivered.token_ids:
            self._advance(token_id)
            pieces.append(self._decoder.decode(VOCABULARY[token_id]))
        if not pieces:
            return None
        ends = () if self._sampling.ignore_eos else (END,)
        due, self.finish_reason = catch_up(pieces, self._stops, self._delivered, self._limit, ends)
        return GenerationChunk(text=due)

    def next(self, size: int) -> GenerationChunk:
        """Up to `size` tokens, fewer where the answer ends."""
        token_ids: list[int] = []
        text = ""
        logprobs: list[TokenLogprob] = []
        while len(token_ids) < size and self.finish_reason is None:
            token_id = self._choose()
            logprobs.append(_logprob(token_id, self._state, self._sampling.logprobs or 0))
            self._advance(token_id)
            token_ids.append(token_id)
            text += self._stops.feed(self._decoder.decode(VOCABULARY[token_id]))
            self._look_for_end()
        told = tuple(logprobs) if self._sampling.logprobs is not None else None
        return GenerationChunk(tuple(token_ids), text + self._rest(), told)

    def last(self) -> GenerationChunk:
        usage = Usage(self._num_prompt_tokens, self.num_tokens)
        return GenerationChunk(finish_reason=self.finish_reason, usage=usage)

    def _choose(self) -> int:
        number = int.from_bytes(self._state[:4], "big")
        is_head = 0 < self._last_id < _FIRST_WHOLE and self._last_id % 2 == 1
        if is_head and number % 8:
            return self._last_id + 1
        if number % 997 == 0 and not self._sampling.ignore_eos:
            return END
        return 1 + number // 8 % (len(VOCABULARY) - 1)

    def _advance(self, token_id: int) -> None:
        self._state = _digest(self._state, token_id)
        self._last_id = token_id
        self.num_tokens += 1

    def _look_for_end(self) -> None:
        if self._stops.matched is not None or (self._last_id == END and not self._sampling.ignore_eos):
            self.finish_reason = "stop"
        elif self.num_tokens >= self._limit:
            self.finish_reason = "length"

    def _rest(self) -> str:
        """What was held back, once the answer has ended."""
        if self.finish_reason is None:
            return ""
        return self._stops.finish()


def whole_answer(request: GenerationRequest) -> tuple[str, list[TokenLogprob], GenerationChunk]:
    """Text, log-probabilities and last chunk of an answer that nothing disturbs."""
    answer = HashAnswer(request)
    text, logprobs = "", []
    while answer.finish_reason is None:
        chunk = answer.next(1)
        text += chunk.text
        logprobs += chunk.logprobs or ()
    return text, logprobs, answer.last()


def prompt_ids(request: GenerationRequest) -> Sequence[int]:
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    if request.messages is not None:
        return list(json.dumps(list(request.messages), ensure_ascii=False).encode())
    return list((request.prompt_text or "").encode())


def sampling_of(**fields: object) -> SamplingParams:
    return SamplingParams(**fields)  # type: ignore[arg-type]


def _digest(state: bytes, *numbers: int) -> bytes:
    data = b"".join(number.to_bytes(8, "big", signed=True) for number in numbers)
    return hashlib.blake2b(state + data, digest_size=32).digest()


def _logprob(token_id: int, state: bytes, num_alternatives: int) -> TokenLogprob:
    top = tuple((f"t{state[4 + n]}", -n - state[5 + n] / 256) for n in range(num_alternatives))
    return TokenLogprob(token_id, f"t{token_id}", -state[3] / 64, top)
