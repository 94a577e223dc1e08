"""Going on with an answer that another engine began, as far as it is the same for all engines. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from cluster.engine import Delivered, FinishReason, GenerationRequest, SamplingParams
from cluster.engines.stop_strings import StopMatcher
from cluster.errors import CannotContinue

# Odd, near the golden ratio times 2**64: neighbouring numbers of tokens get seeds that are far apart.
_SEED_STEP = 0x9E3779B97F4A7C15
_SEED_LIMIT = 1 << 63

NOTHING = Delivered((), 0)


def delivered_of(request: GenerationRequest) -> Delivered:
    return request.delivered or NOTHING


def remaining_sampling(sampling: SamplingParams, delivered: Delivered, max_tokens: int) -> SamplingParams:
    """What to sample with after the delivered tokens. `max_tokens` is the limit of the whole answer.

    A seed cannot be taken up in the middle: engines do not tell the state of their random numbers, and the same seed
    would draw those of the beginning again. So the rest gets a seed of its own that follows from both numbers.
    """
    num_tokens = len(delivered.token_ids)
    seed = sampling.seed
    if seed is not None and num_tokens:
        seed = (seed + num_tokens * _SEED_STEP) % _SEED_LIMIT
    return replace(sampling, seed=seed, max_tokens=max_tokens - num_tokens)


class CaughtUp(NamedTuple):
    """`due` is text that the client has not got yet. `finish_reason`: the delivered tokens are the whole answer."""

    due: str
    finish_reason: FinishReason | None


def catch_up(
    pieces: Iterable[str], stops: StopMatcher, delivered: Delivered, max_tokens: int, end_ids: Container[int] = ()
) -> CaughtUp:
    """Bring `stops` to where the other engine was. `pieces` are the texts of the delivered tokens, `end_ids` tokens
    that end an answer, `max_tokens` is the limit of the whole one.

    Text that the other engine held back was shown only if the answer had ended. Raises `CannotContinue` where more was
    shown than even that: then these are not the tokens of the text.
    """
    shown = "".join(map(stops.feed, pieces))
    finish_reason: FinishReason | None = None
    if stops.matched is not None or delivered.token_ids[-1] in end_ids:
        finish_reason = "stop"
    elif len(delivered.token_ids) >= max_tokens:
        finish_reason = "length"
    elif len(shown) < delivered.num_characters:
        finish_reason = "stop"
    if finish_reason is not None:
        shown += stops.finish()
    if len(shown) < delivered.num_characters:
        raise CannotContinue(
            f"The delivered tokens spell {len(shown)} characters, but {delivered.num_characters} were shown. Ask again."
        )
    return CaughtUp(shown[delivered.num_characters :], finish_reason)


def decode_pieces(pieces: Iterable[bytes]) -> Iterator[str]:
    """Text of tokens as each completes it. Raises `CannotContinue` where the last one ends within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield decoder.decode(piece)
    if decoder.getstate()[0]:
        raise CannotContinue("The delivered tokens end in the middle of a character. Ask again.")
