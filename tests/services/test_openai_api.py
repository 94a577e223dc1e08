"""Requests: every documented field is served or refused by name, and every refusal says what to do."""

import json
from typing import Any

import numpy as np
import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.embedding_create_params import EmbeddingCreateParams

from services.errors import ApiError
from services.openai_api import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, embedding_answer
from services.validation import RequestBody, parse_body

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_body(ChatCompletionRequest, json.dumps(CHAT | fields).encode())


def refusal(kind: type[RequestBody], body: dict[str, Any] | bytes) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse_body(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert refused.value.status == 400
    return refused.value


@pytest.mark.parametrize(
    ("kind", "documented"),
    [
        (ChatCompletionRequest, chat_params.CompletionCreateParamsBase.__annotations__),
        (CompletionRequest, CompletionCreateParamsBase.__annotations__),
        (EmbeddingRequest, EmbeddingCreateParams.__annotations__),
    ],
)
def test_every_field_that_openai_documents_is_known(kind: type[RequestBody], documented: dict[str, Any]) -> None:
    assert set(documented) - set(kind.model_fields) == set()


def test_every_refused_field_is_refused_by_name_and_accepted_as_null() -> None:
    for name in ChatCompletionRequest.REFUSED:
        error = refusal(ChatCompletionRequest, CHAT | {name: {"x": 1}})
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert f"'{name}' is not supported. " in error.message
        chat(**{name: None})


@pytest.mark.parametrize(
    ("fields", "param", "code", "text"),
    [
        ({"temperatur": 1}, "temperatur", "unknown_parameter", "Did you mean 'temperature'?"),
        ({"knowledge": {"collections": ["a"], "topk": 3}}, "knowledge.topk", "unknown_parameter", "mean 'top_k'?"),
        ({"messages": [{"role": "user", "contnt": "a"}]}, "messages[0].contnt", "unknown_parameter", "'content'?"),
        ({"temperature": "0.5"}, "temperature", "invalid_type", "valid number, but it is '0.5'"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2, but it is 3"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type", "1.5"),
        ({"stream": "yes"}, "stream", "invalid_type", "valid boolean"),
        ({"stop": [1]}, "stop[0]", "invalid_type", "valid string"),
        ({"stop": list("abcde")}, "stop", "invalid_value", "at most 4 items"),
        ({"stop": ""}, "stop", "invalid_value", "at least 1 character"),
        ({"n": 2}, "n", "unsupported_value", "Send the request 2 times"),
        ({"messages": []}, "messages", "invalid_value", "at least 1 item"),
        ({"messages": "x"}, "messages", "invalid_type", "valid array"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "invalid_value", "'developer'"),
        ({"messages": [{"role": "user"}]}, "messages", "invalid_value", "needs 'content'"),
        ({"messages": [{"role": "user", "content": "a", "name": "bo"}]}, "messages", "unsupported_parameter", "'name'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "invalid_value", "'tool_call_id'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages",
            "unsupported_value",
            "'image_url' is not supported",
        ),
        ({"tool_choice": "auto"}, "tool_choice", "invalid_value", "needs 'tools'"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "invalid_value", "'function'"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", "invalid_value", "True"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value", "needs 'logprobs'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "needs 'stream'"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value", "differ"),
        ({"seed": 1, "random_seed": 2}, "random_seed", "invalid_value", "differ"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_type", "integer"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value", "100"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value", "belongs to"),
        ({"store": True}, "store", "invalid_value", "False"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "invalid_value", "'none'"),
        ({"modalities": ["audio"]}, "modalities[0]", "invalid_value", "'text'"),
        ({"windfarm_tools": ["calc"]}, "windfarm_tools[0]", "invalid_value", "'calculator'"),
        ({"knowledge": {"collections": []}}, "knowledge.collections", "invalid_value", "at least 1 item"),
        ({"model": None}, "model", "invalid_type", "valid string"),
    ],
)
def test_a_wrong_field_is_named_with_the_reason(fields: dict[str, Any], param: str, code: str, text: str) -> None:
    error = refusal(ChatCompletionRequest, CHAT | fields)
    assert (error.param, error.code) == (param, code)
    assert text in error.message


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "empty_body"),
        (b" \n", "empty_body"),
        (b"{", "invalid_json"),
        (b"hello", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b"[1]", "invalid_type"),
        (b'"text"', "invalid_type"),
        (b"null", "invalid_type"),
        (b"{}", "missing_required_parameter"),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(body: bytes, code: str) -> None:
    assert refusal(ChatCompletionRequest, body).code == code


def test_not_a_number_is_no_number() -> None:
    error = refusal(ChatCompletionRequest, json.dumps(CHAT | {"temperature": float("nan")}).encode())
    assert (error.param, error.code) == ("temperature", "invalid_value")


def test_sampling_fields_reach_the_engine() -> None:
    sampling = chat(
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=7,
        stop="END",
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=2,
    ).sampling()
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.9, 40)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 1, -1)
    assert (sampling.seed, sampling.stop, sampling.logit_bias, sampling.logprobs) == (7, ("END",), {5: -100}, 2)


def test_logprobs_without_alternatives_ask_for_the_chosen_token_alone() -> None:
    assert chat(logprobs=True).sampling().logprobs == 0
    assert chat().sampling().logprobs is None


def test_response_formats_become_schemas() -> None:
    schema = {"type": "object", "properties": {"schema": {"type": "string"}}}
    wanted = chat(response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}})
    assert wanted.sampling().json_schema == schema
    assert chat(response_format={"type": "json_object"}).sampling().json_schema == {"type": "object"}
    assert chat(response_format={"type": "text"}).sampling().json_schema is None


def test_text_parts_become_one_text_and_the_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = chat(messages=[{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}])
    assert request.engine_messages() == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one\ntwo"},
    ]


def test_an_answer_of_the_official_client_can_be_sent_back() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call], "annotations": []}
    result = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    request = chat(messages=[*CHAT["messages"], answer, result], tools=[TOOL])
    assert request.engine_messages()[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert request.engine_messages()[2] == {"role": "tool", "content": "3", "tool_call_id": "c1"}


def test_tool_choices_are_reduced_to_a_name() -> None:
    assert chat().tool_choice_name == "auto"
    assert chat(tools=[TOOL], tool_choice="required").tool_choice_name == "required"
    named = {"type": "function", "function": {"name": "look"}}
    assert chat(tools=[TOOL], tool_choice=named).tool_choice_name == "look"


def test_mistrals_own_field_names_are_understood() -> None:
    request = chat(random_seed=5, safe_prompt=True, tools=[TOOL], tool_choice="any")
    assert request.sampling().seed == 5
    assert request.engine_messages()[0]["content"].startswith("Always assist with care, respect, and truth.")
    assert request.tool_choice_name == "required"


def test_only_requests_without_retrieval_tools_and_conversation_are_plain() -> None:
    assert chat().is_plain
    for fields in (
        {"knowledge": {"collections": ["a"]}},
        {"conversation": "conv_1"},
        {"windfarm_tools": ["datetime"]},
        {"tools": [TOOL]},
    ):
        assert not chat(**fields).is_plain


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("Once", {"prompt_text": "Once"}),
        (["Once"], {"prompt_text": "Once"}),
        ([1, 2], {"prompt_token_ids": [1, 2]}),
        ([[1, 2]], {"prompt_token_ids": [1, 2]}),
    ],
)
def test_a_completion_takes_text_or_token_ids(prompt: Any, field: dict[str, Any]) -> None:
    request = parse_body(CompletionRequest, json.dumps({"model": "tiny", "prompt": prompt}).encode())
    assert request.prompt_field() == field
    assert request.sampling().max_tokens == 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ],
)
def test_completions_refuse_what_they_cannot_do(fields: dict[str, Any], param: str) -> None:
    assert refusal(CompletionRequest, {"model": "tiny"} | fields).param == param


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2], "token ids"),
        ([[1], [2]], "token ids"),
        ("", "empty"),
        (["a", ""], "empty"),
        ([], "empty"),
        (["a"] * 2049, "at most 2048"),
    ],
)
def test_embeddings_refuse_nothing_and_too_much_and_ids_that_nobody_vouches_for(value: Any, text: str) -> None:
    error = refusal(EmbeddingRequest, {"model": "embed", "input": value})
    assert error.param == "input"
    assert text in error.message


@pytest.mark.parametrize(("value", "ids"), [([1, 2], [[1, 2]]), ([0], [[0]]), ([[1], [2, 3]], [[1], [2, 3]])])
def test_embeddings_take_token_ids_where_they_are_said_to_be_the_models_own(value: Any, ids: list[list[int]]) -> None:
    request = parse_body(EmbeddingRequest, json.dumps({"model": "embed", "input": value, "input_type": "raw"}).encode())
    assert request.token_ids() == ids
    assert request.texts() == []
    with pytest.raises(ApiError, match="empty"):
        parse_body(EmbeddingRequest, b'{"model": "embed", "input": [[1], []], "input_type": "raw"}')


def test_embedding_answers_say_which_inputs_were_cut() -> None:
    request = parse_body(EmbeddingRequest, b'{"model": "embed", "input": ["a", "b"]}')
    vectors = np.array([[0.5, 0.25], [1, 0]], dtype=np.float32)
    answer = embedding_answer(request, "embed", vectors, [3, 512], [False, True])
    assert [entry["embedding"] for entry in answer["data"]] == [[0.5, 0.25], [1.0, 0.0]]
    assert answer["usage"] == {"prompt_tokens": 515, "total_tokens": 515}
    assert answer["windfarm"] == {"truncated": [1]}
    whole = embedding_answer(request, "embed", vectors, [3, 5], [False, False])
    assert "windfarm" not in whole


def test_embeddings_can_be_had_as_base64_of_floats() -> None:
    request = parse_body(EmbeddingRequest, b'{"model": "embed", "input": "a", "encoding_format": "base64"}')
    answer = embedding_answer(request, "embed", np.array([[1, 2]], dtype=np.float32), [1], [False])
    assert answer["data"][0]["embedding"] == "AACAPwAAAEA="
