"""What is reserved before a model has seen a request."""

from typing import Any

import pytest

from services.openai_api import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from services.token_estimate import estimate_chat, estimate_completion, estimate_embedding
from services.token_meter import Estimate


def chat(**fields: Any) -> Estimate:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 40}]} | fields
    return estimate_chat(ChatCompletionRequest.model_validate(body), default_max_tokens=512, default_top_k=3)


@pytest.mark.parametrize(
    ("fields", "estimate"),
    [
        ({}, Estimate(14, 512)),
        ({"max_tokens": 7}, Estimate(14, 7)),
        ({"max_completion_tokens": 8}, Estimate(14, 8)),
        ({"messages": [{"role": "user", "content": "x" * 41}] * 2}, Estimate(30, 512)),
        ({"messages": [{"role": "user", "content": "日" * 40}]}, Estimate(34, 512)),  # 120 bytes
        ({"knowledge": {"collections": ["a"]}}, Estimate(614, 512)),
        ({"knowledge": {"collections": ["a"], "top_k": 5}}, Estimate(1014, 512)),
    ],
)
def test_a_chat_reserves_its_text_its_passages_and_its_longest_answer(
    fields: dict[str, Any], estimate: Estimate
) -> None:
    assert chat(**fields) == estimate


def test_tools_are_part_of_the_prompt() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 400}}
    assert chat(tools=[tool]).num_prompt_tokens > 14 + 100


@pytest.mark.parametrize(
    ("fields", "estimate"),
    [
        ({"prompt": "x" * 40}, Estimate(10, 16)),
        ({"prompt": ["x" * 40], "max_tokens": 5}, Estimate(10, 5)),
        ({"prompt": [1, 2, 3]}, Estimate(3, 16)),
        ({"prompt": [[1, 2, 3, 4]]}, Estimate(4, 16)),
    ],
)
def test_a_completion_counts_ids_exactly(fields: dict[str, Any], estimate: Estimate) -> None:
    assert estimate_completion(CompletionRequest.model_validate({"model": "tiny"} | fields)) == estimate


@pytest.mark.parametrize(
    ("fields", "num_tokens"),
    [
        ({"input": "x" * 40}, 10),
        ({"input": ["x", "y" * 5]}, 3),
        ({"input": [[1, 2], [3]], "input_type": "raw"}, 3),
    ],
)
def test_an_embedding_has_no_answer(fields: dict[str, Any], num_tokens: int) -> None:
    assert estimate_embedding(EmbeddingRequest.model_validate({"model": "embed"} | fields)) == Estimate(num_tokens)
