"""Checks that every engine makes before it starts to generate. Pure; each error names the field and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.engine import GenerationRequest, SamplingParams
from cluster.errors import ContextTooLong, InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 500
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024


def check_request(request: GenerationRequest) -> None:
    """Exactly one kind of prompt, and sampling parameters in range."""
    given = [n for n in ("messages", "prompt_text", "prompt_token_ids") if getattr(request, n) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"Give exactly one of messages, prompt_text and prompt_token_ids, not {' and '.join(given) or 'none'}."
        )
    if not getattr(request, given[0]):
        raise InvalidRequest(f"{given[0]} is empty: there is nothing to answer.", param=given[0])
    check_sampling(request.sampling)
    if request.delivered is not None and request.delivered.num_characters < 0:
        raise InvalidRequest("delivered.num_characters is negative.", param="delivered")


def check_sampling(sampling: SamplingParams) -> None:
    _check_range("temperature", sampling.temperature, 0, 100)
    _check_range("top_p", sampling.top_p, 0, 1)
    _check_range("min_p", sampling.min_p, 0, 1)
    _check_range("presence_penalty", sampling.presence_penalty, -2, 2)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2, 2)
    _check_range("top_k", sampling.top_k, 0, 1 << 31)
    _check_range("max_tokens", sampling.max_tokens, 1, 1 << 31)
    _check_range("logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    _check_range("seed", sampling.seed, -(1 << 63), (1 << 63) - 1)
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(sampling.stop)} strings; at most {MAX_STOPS} are allowed.", param="stop")
    if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in sampling.stop):
        raise InvalidRequest(f"Each stop string must have 1 to {MAX_STOP_CHARACTERS} characters.", param="stop")
    if sampling.json_schema is not None and sampling.grammar is not None:
        raise InvalidRequest("Give json_schema or grammar, not both.", param="response_format")
    if len(sampling.logit_bias or ()) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"logit_bias may name at most {MAX_LOGIT_BIASES} tokens.", param="logit_bias")
    for bias in (sampling.logit_bias or {}).values():
        _check_range("logit_bias", bias, -100, 100)


def check_token_ids(token_ids: Sequence[int], vocabulary_size: int, *, param: str) -> None:
    outside = next((token for token in token_ids if not 0 <= token < vocabulary_size), None)
    if outside is not None:
        raise InvalidRequest(
            f"{param}: {outside} is no token id; this model has 0 to {vocabulary_size - 1}.", param=param
        )


def answer_limit(num_prompt_tokens: int, max_tokens: int | None, max_context: int) -> int:
    """How many tokens the answer may have. Raises `ContextTooLong` when prompt and answer do not fit."""
    if num_prompt_tokens >= max_context:
        raise ContextTooLong(
            f"The prompt has {num_prompt_tokens} tokens, but the model's context is {max_context} tokens, "
            "answer included. Shorten the prompt."
        )
    room = max_context - num_prompt_tokens
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise ContextTooLong(
            f"The prompt has {num_prompt_tokens} tokens and max_tokens asks for {max_tokens} more, but the model's "
            f"context is {max_context} tokens. Use max_tokens of at most {room}, or shorten the prompt.",
            param="max_tokens",
        )
    return max_tokens


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} is {value}; it must be {low} to {high}.", param=name)
