"""The one contract between windfarm and whatever generates tokens.

An engine takes messages, text or token ids with sampling parameters and gives back a stream of token ids and text. It
knows nothing of HTTP, keys, retrieval or Ray. Cancelling is closing the stream: `aclose()` on the iterator frees the
engine's slot. A dead engine raises in `check_health`, so that whoever runs it can restart it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from cluster.expert_load import ExpertLoad

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens. `None` means that the engine's or model's own default applies.

    `logprobs` is the number of alternatives per token (0: only the chosen token's own); `None` turns logprobs off.
    At most one of `json_schema` and `grammar` (GBNF) may be given.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a client already has of an answer that another engine began: its tokens and how many characters of text.

    The text may be shorter than what the tokens spell: half a character, or what may become a stop string, is held
    back.
    """

    token_ids: tuple[int, ...]
    num_characters: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation. Exactly one of `messages`, `prompt_text` and `prompt_token_ids` is given.

    `messages` are OpenAI chat messages, rendered with the model's own chat template; `tools` (OpenAI tool schemas) are
    handed to that template where it knows them. `prompt_token_ids` are used as they are, without special tokens added.

    With `delivered` the engine goes on with an answer: its chunks hold what comes after that, while `sampling` and the
    usage at the end mean the whole answer. Raises `CannotContinue` where it cannot.
    """

    request_id: str
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt_text: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    delivered: Delivered | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of one token's probability, with the alternatives asked for, best first. Remote engines do not
    tell token ids."""

    token_id: int | None
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """One piece of a stream.

    `text` is ready to show (never half a UTF-8 character, never part of a stop string). `token_ids` are the tokens
    sampled since the last chunk; a chunk may carry tokens without text, or text of held-back tokens. Remote engines
    that do not tell token ids leave them empty. Only the last chunk has `finish_reason` and `usage`.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine knows of its model. `max_context` is in tokens, prompt and answer together."""

    model: str
    engine: str
    max_context: int
    max_concurrency: int
    gives_token_ids: bool = True
    gives_logprobs: bool = True
    takes_json_schema: bool = True
    takes_grammar: bool = True
    continues_answers: bool = False
    """Whether it takes `delivered`."""
    continues_guided_answers: bool = False
    """The same for answers that are bound to a JSON schema or a grammar."""
    identity: str = ""
    """Of weights and tokenizer: token ids of one engine mean something to another one only where these are equal.
    Empty: not known."""
    checkpoint: str = ""
    """Fingerprint of the checkpoint's content, for models with experts; empty: not known."""
    template_knows_tools: bool = False
    """Whether `tools` reach the prompt through the chat template; otherwise the caller must put them there."""


class EngineLoad(NamedTuple):
    """What an engine works on at one moment."""

    num_running: int
    """Generations that run."""
    num_queued: int
    """Requests that wait for a slot."""
    num_tokens: int = 0
    """Tokens of prompts and answers that the running ones hold in the KV cache."""
    max_tokens: int = 0
    """Tokens that the KV cache holds; 0: not known."""


class Engine(Protocol):
    """What runs a model. Every method may raise the errors of this package's `errors` module."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def load(self) -> EngineLoad:
        """What it works on now."""

    async def start(self) -> None:
        """Load the model; returns when the first token can be asked for."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Stream one generation. Bad input raises `InvalidRequest` before the first chunk."""

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """Number of tokens of the rendered prompt, special tokens included."""

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""

    async def expert_load(self) -> ExpertLoad | None:
        """What was counted of the model's experts since the engine started; `None`: the model has no experts.

        Raises `LoadUnavailable` where the model has experts and this engine cannot count them.
        """

    async def check_health(self) -> None:
        """Raise `EngineDead` when this engine cannot generate any more."""

    async def stop(self) -> None:
        """End the engine and every process it started. Safe to call twice."""
