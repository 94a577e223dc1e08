"""How many tokens a request may use, told from its text alone: what the limits of a key reserve before it begins.

No tokenizer is asked: it is in the replica, and the reservation is corrected when the answer has ended. Four bytes of
text are taken for one token, which is near for English and a little low for other languages of Latin script.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from services.openai_api import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from services.token_meter import Estimate

_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_PASSAGE = 200
"""The default size of a passage."""


def estimate_chat(request: ChatCompletionRequest, default_max_tokens: int, default_top_k: int) -> Estimate:
    messages = request.engine_messages()
    prompt = _tokens(message["content"] for message in messages) + _TOKENS_PER_MESSAGE * len(messages)
    if request.tools:
        prompt += _tokens([json.dumps([tool.model_dump(exclude_none=True) for tool in request.tools])])
    if request.knowledge:
        prompt += _TOKENS_PER_PASSAGE * (request.knowledge.top_k or default_top_k)
    return Estimate(prompt, request.max_completion_tokens or request.max_tokens or default_max_tokens)


def estimate_completion(request: CompletionRequest) -> Estimate:
    field = request.prompt_field()
    ids = field.get("prompt_token_ids")
    prompt = len(ids) if ids is not None else _tokens([field["prompt_text"]])
    return Estimate(prompt, request.sampling().max_tokens or 0)


def estimate_embedding(request: EmbeddingRequest) -> Estimate:
    texts, ids = request.texts(), request.token_ids()
    return Estimate(sum(map(len, ids)) + _tokens(texts))


def estimate_search(queries: Iterable[str]) -> int:
    return _tokens(queries)


def _tokens(texts: Iterable[str]) -> int:
    """Each text rounded up: it is at least one token, if it is not empty."""
    return sum(-(-len(text.encode()) // _BYTES_PER_TOKEN) for text in texts)
