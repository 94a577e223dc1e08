"""Brings the grammar of a continued answer to where the answer is, before vLLM samples the next token.

A continued answer reaches vLLM as a prompt that ends with tokens of the answer. vLLM starts every grammar at its
beginning, and the model would begin the JSON text again in the middle of it. The part belongs into the process that
schedules, whatever the platform.
"""

from __future__ import annotations

from typing import Any

from cluster.vllm_plugin.options import num_delivered_tokens


def install() -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    original = StructuredOutputManager._create_grammar

    def create_grammar(self: Any, request: Any) -> Any:
        grammar = original(self, request)
        if num_tokens := num_delivered_tokens(request.sampling_params):
            advance(grammar, request.request_id, list(request.prompt_token_ids[-num_tokens:]))
        return grammar

    StructuredOutputManager._create_grammar = create_grammar


def advance(grammar: Any, request_id: str, token_ids: list[int]) -> None:
    """Raises `ValueError` where the grammar does not allow these tokens; vLLM then refuses the request."""
    if not grammar.accept_tokens(request_id, token_ids):
        raise ValueError("The tokens of the answer so far do not fit its grammar, so it cannot be continued.")
