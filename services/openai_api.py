"""Requests and answers of the public API in OpenAI's shapes, with windfarm's own fields beside them.

Every field that OpenAI documents is either served or refused by name; none is accepted and then ignored. The few
fields that Mistral's API names differently (`random_seed`, `safe_prompt`, `tool_choice: "any"`) are understood too.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from cluster.engine import SamplingParams, Usage
from services.validation import FieldError, RequestBody

MAX_STOP_STRINGS = 4
MAX_EMBEDDING_INPUTS = 2048
# OpenAI's documented default for the older text completions.
_DEFAULT_COMPLETION_TOKENS = 16
_SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid harmful, unethical, "
    "prejudiced, or negative content. Ensure replies promote fairness and positivity."
)

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)]
)


class StreamOptions(RequestBody):
    REFUSED: ClassVar[dict[str, str]] = {"include_obfuscation": "Streams are not padded here; leave it out."}

    include_usage: bool | None = None
    include_obfuscation: None = None


class TextPart(RequestBody):
    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None

    @model_validator(mode="after")
    def _is_text(self) -> TextPart:
        if self.type != "text":
            raise FieldError(
                f"Content of the type '{self.type}' is not supported: the models here read text. "
                "Documents go into a collection (POST /v1/collections/{name}/documents).",
                param="messages",
                code="unsupported_value",
            )
        if self.text is None or self.image_url or self.input_audio or self.file:
            raise FieldError("A content part of the type 'text' holds 'text' and nothing else.", param="messages")
        return self


class FunctionCall(RequestBody):
    name: str
    arguments: str


class ToolCall(RequestBody):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(RequestBody):
    REFUSED: ClassVar[dict[str, str]] = {
        "function_call": "Use 'tool_calls'.",
        "audio": "The models here read text.",
        "refusal": "Put the text into 'content'.",
        "annotations": "Leave it out.",
        "prefix": "Continuing an answer is not supported; send a 'user' message last.",
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: None = None
    audio: None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    prefix: Literal[False] | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise FieldError(f"A message with the role '{self.role}' needs 'content'.", param="messages")
        if self.tool_calls and self.role != "assistant":
            raise FieldError("Only messages with the role 'assistant' may hold 'tool_calls'.", param="messages")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise FieldError("Messages with the role 'tool', and only those, hold 'tool_call_id'.", param="messages")
        if self.name is not None and self.role != "tool":
            raise FieldError(
                "'name' is supported in messages with the role 'tool' alone: chat templates do not show it to the "
                "model. Write the name into 'content'.",
                param="messages",
                code="unsupported_parameter",
            )
        return self

    def to_engine(self) -> dict[str, Any]:
        """As chat templates expect it: text in one string, and no role that they do not know."""
        text = (
            self.content if not isinstance(self.content, list) else "\n".join(part.text or "" for part in self.content)
        )
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text or ""}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message


class FunctionDefinition(RequestBody):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestBody):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(RequestBody):
    name: str


class NamedToolChoice(RequestBody):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(RequestBody):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError(
                "'json_schema' belongs to the response format 'json_schema', and to it alone.",
                param="response_format.json_schema",
            )
        return self

    def to_schema(self) -> dict[str, Any] | None:
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Knowledge(RequestBody):
    """Answer from these collections and cite them."""

    collections: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=32)]
    top_k: Annotated[int, Field(ge=1, le=50)] | None = None
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None


class _Generation(RequestBody):
    """What chat and text completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: PositiveInt | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Seed | None = None
    random_seed: Seed | None = None
    stop: Stop | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: int | None = None
    user: str | None = None
    """The client's own name for its user; written into the request log."""

    @model_validator(mode="after")
    def _is_servable(self) -> _Generation:
        if self.n not in (None, 1):
            raise FieldError(
                f"'n' is {self.n}, but one answer per request is supported. Send the request {self.n} times.",
                param="n",
                code="unsupported_value",
            )
        if self.stream_options is not None and not self.stream:
            raise FieldError("'stream_options' needs 'stream': true.", param="stream_options")
        if self.seed is not None and self.random_seed not in (None, self.seed):
            raise FieldError("'seed' and 'random_seed' mean the same but differ. Send one.", param="random_seed")
        return self

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _common_sampling(self) -> dict[str, Any]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed if self.seed is not None else self.random_seed,
            "stop": stop,
            "logit_bias": self.logit_bias,
        }


class ChatCompletionRequest(_Generation):
    """`POST /v1/chat/completions`."""

    REFUSED: ClassVar[dict[str, str]] = {
        "audio": "The models here write text.",
        "function_call": "Use 'tool_choice'.",
        "functions": "Use 'tools'.",
        "metadata": "Answers are stored only in a conversation of yours; see 'conversation'.",
        "moderation": "No moderation model runs here.",
        "prediction": "Predicted output is not used here.",
        "prompt_cache_key": "Prompts are cached by their content alone.",
        "prompt_cache_options": "Prompts are cached by their content alone.",
        "prompt_cache_retention": "Prompts are cached by their content alone.",
        "prompt_mode": "Leave it out.",
        "safety_identifier": "Use 'user'.",
        "verbosity": "Say in the prompt how long the answer shall be.",
        "web_search_options": "There is no web search. Put documents into a collection and name it in 'knowledge'.",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | NamedToolChoice | None = None
    parallel_tool_calls: Literal[True] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    service_tier: Literal["auto", "default", "flex"] | None = None
    """flex: waits until no other request waits for the model."""
    store: Literal[False] | None = None
    safe_prompt: bool | None = None
    """Mistral's: begin with its documented safety instruction."""

    knowledge: Knowledge | None = None
    conversation: str | None = None
    windfarm_tools: list[Literal["calculator", "datetime", "knowledge_search"]] | None = None

    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    prompt_mode: None = None
    safety_identifier: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatCompletionRequest:
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise FieldError(
                "'max_tokens' and 'max_completion_tokens' mean the same but differ. Send one.", param="max_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        if self.tool_choice not in (None, "none") and not self.tools and not self.windfarm_tools:
            raise FieldError("'tool_choice' needs 'tools' or 'windfarm_tools'.", param="tool_choice")
        return self

    @property
    def is_plain(self) -> bool:
        """True when the model's own stream is the answer: nothing to retrieve, to run or to store."""
        return not (self.knowledge or self.conversation or self.windfarm_tools or self.tools)

    @property
    def tool_choice_name(self) -> str:
        """`none`, `auto`, `required`, or the name of the one function that must be called."""
        if isinstance(self.tool_choice, NamedToolChoice):
            return self.tool_choice.function.name
        return "required" if self.tool_choice == "any" else (self.tool_choice or "auto")

    def engine_messages(self) -> list[dict[str, Any]]:
        messages = [message.to_engine() for message in self.messages]
        if self.safe_prompt:
            messages.insert(0, {"role": "system", "content": _SAFE_PROMPT})
        return messages

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self.response_format.to_schema() if self.response_format else None,
            **self._common_sampling(),
        )


class CompletionRequest(_Generation):
    """`POST /v1/completions`: text or token ids in, their continuation out."""

    REFUSED: ClassVar[dict[str, str]] = {"suffix": "Filling in the middle is not supported."}

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _asks_for_one_text(self) -> CompletionRequest:
        if self.best_of not in (None, 1):
            raise FieldError("'best_of' is not supported. Leave it out.", param="best_of", code="unsupported_value")
        if not self.prompt or self.prompt == [""]:
            raise FieldError("'prompt' is empty.", param="prompt")
        if isinstance(self.prompt, list) and len(self.prompt) > 1 and not isinstance(self.prompt[0], int):
            raise FieldError(
                f"'prompt' holds {len(self.prompt)} prompts, but one per request is supported. Send them one by one.",
                param="prompt",
                code="unsupported_value",
            )
        return self

    def prompt_field(self) -> dict[str, Any]:
        """The prompt as one field of a generation request: `prompt_text` or `prompt_token_ids`."""
        if isinstance(self.prompt, str):
            return {"prompt_text": self.prompt}
        first = self.prompt[0]
        if isinstance(first, int):
            return {"prompt_token_ids": self.prompt}
        return {"prompt_text": first} if isinstance(first, str) else {"prompt_token_ids": first}

    def sampling(self) -> SamplingParams:
        max_tokens = self.max_tokens if self.max_tokens is not None else _DEFAULT_COMPLETION_TOKENS
        return SamplingParams(max_tokens=max_tokens, logprobs=self.logprobs, **self._common_sampling())


class EmbeddingRequest(RequestBody):
    """`POST /v1/embeddings`."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveInt | None = None
    input_type: Literal["query", "passage", "raw"] | None = None
    """windfarm's: which of the model's prefixes to add. By default `query`, the one for comparing like with like."""
    user: str | None = None

    @model_validator(mode="after")
    def _is_text_or_ids(self) -> EmbeddingRequest:
        texts, ids = self.texts(), self.token_ids()
        if ids and self.input_type != "raw":
            # Some clients send ids of OpenAI's tokenizer without being asked; the vectors would mean nothing.
            raise FieldError(
                "'input' holds token ids. They are taken as they are, without a prefix, and must be of this model's "
                "own tokenizer: add 'input_type': 'raw' where they are, or send text (LangChain: "
                "check_embedding_ctx_length=False).",
                param="input",
                code="unsupported_value",
            )
        if not (texts or ids) or not all(texts) or not all(ids):
            raise FieldError("'input' is empty or holds an empty text.", param="input")
        if len(texts) + len(ids) > MAX_EMBEDDING_INPUTS:
            raise FieldError(
                f"'input' holds {len(texts) + len(ids)} texts, at most {MAX_EMBEDDING_INPUTS} are allowed.",
                param="input",
            )
        return self

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else [text for text in self.input if isinstance(text, str)]

    def token_ids(self) -> list[list[int]]:
        """One list per text; empty where `input` is text."""
        if isinstance(self.input, str):
            return []
        single = [item for item in self.input if isinstance(item, int)]
        return [single] if single else [item for item in self.input if isinstance(item, list)]


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def embedding_answer(
    request: EmbeddingRequest,
    model: str,
    vectors: npt.NDArray[np.float32],
    num_tokens: Sequence[int],
    truncated: Sequence[bool],
) -> dict[str, Any]:
    total = int(sum(num_tokens))
    answer: dict[str, Any] = {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encode(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": total, "total_tokens": total},
    }
    if any(truncated):
        answer["windfarm"] = {"truncated": [index for index, cut in enumerate(truncated) if cut]}
    return answer


def _encode(vector: npt.NDArray[np.float32], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
