"""Any OpenAI-compatible API as an engine, so that a team can add the models that it already has.

The other side renders, tokenizes and limits; it tells no token ids, and prompt lengths are estimated here (a third of
the bytes, which is on the safe side for most languages). An answer counts as complete only with a finish reason and
`[DONE]`; anything else is an error, never a short answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import aiohttp

from cluster.engine import (
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from cluster.engines.admission import Admission
from cluster.engines.request_checks import answer_limit, check_request
from cluster.engines.settings import EngineSettings
from cluster.engines.sse import SseDecoder
from cluster.errors import (
    CannotContinue,
    ClusterError,
    ContextTooLong,
    EngineBusy,
    EngineDead,
    EngineFailed,
    InvalidRequest,
    LoadUnavailable,
    ModelNotFound,
)
from cluster.expert_load import ExpertLoad

CONNECT_LIMIT_S = 10.0
SILENCE_LIMIT_S = 120.0
"""How long the other side may send nothing, where `engine_options` have no `silence_s`."""
ANSWER_LIMIT_S = 10.0
_BYTES_PER_TOKEN = 3
_TOKENS_PER_MESSAGE = 8
# Names under which servers tell the context length in their list of models.
_CONTEXT_FIELDS = ("max_model_len", "max_context_length", "context_length", "max_context")
_OPTIONS = ("silence_s", "stream_options")


class RemoteEngine:
    """One model of a remote API. `engine_options`: `stream_options: false` for servers that refuse that field, and
    `silence_s`, after how many seconds without a byte an answer is given up."""

    def __init__(self, settings: EngineSettings) -> None:
        unknown = sorted(settings.options.keys() - set(_OPTIONS))
        if unknown:
            raise ClusterError(
                f"engine_options: a remote API has no option {unknown[0]!r}, only {' and '.join(_OPTIONS)}."
            )
        self._silence_s = _positive(settings.options.get("silence_s", SILENCE_LIMIT_S))
        self._settings = settings
        self._url = str(settings.location).rstrip("/")
        self._model = settings.remote_model or settings.model
        self._admission = Admission(settings.parallel_requests, settings.max_queued_requests)
        self._max_context = settings.max_context
        self._http: aiohttp.ClientSession | None = None

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            model=self._settings.model,
            engine="remote",
            max_context=self._max_context or 0,
            max_concurrency=self._settings.parallel_requests,
            gives_token_ids=False,
            takes_grammar=False,
        )

    @property
    def load(self) -> tuple[int, int]:
        return self._admission.num_running, self._admission.num_queued

    async def start(self) -> None:
        key = self._settings.remote_key
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S, sock_read=self._silence_s),
            connector=aiohttp.TCPConnector(limit=0),
        )
        try:
            models = await self._models()
            self._max_context = self._settings.max_context or self._told_context(models)
        except ClusterError:
            await self.stop()
            raise

    async def stop(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    async def check_health(self) -> None:
        try:
            await self._models()
        except ClusterError as error:
            raise EngineDead(str(error)) from error

    async def expert_load(self) -> ExpertLoad | None:
        raise LoadUnavailable(f"{self._settings.model} runs at a remote API, which tells nothing of its experts.")

    async def tokenize(self, text: str) -> list[int]:
        raise InvalidRequest(f"{self._settings.model} runs at a remote API, which tells no token ids.")

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """An estimate; see above."""
        check_request(request)
        return _estimate_tokens(request)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """See the contract. Closing the iterator closes the connection."""
        check_request(request)
        if request.delivered is not None:
            raise CannotContinue("A remote API tells no token ids, so an answer cannot be continued there.")
        path, body = self._body(request)
        await self._admission.acquire()
        try:
            async with await self._post(path, body) as answer:
                async for chunk in _read_stream(answer, request.sampling.logprobs):
                    yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineFailed(f"{self._url} was lost in the middle of the answer: {_reason(error)}") from error
        finally:
            self._admission.release()

    def _body(self, request: GenerationRequest) -> tuple[str, dict[str, Any]]:
        sampling = request.sampling
        if sampling.grammar is not None:
            raise InvalidRequest("A remote API takes no grammar. Use a JSON schema.", param="grammar")
        if sampling.max_tokens is not None and self._max_context:
            answer_limit(0, sampling.max_tokens, self._max_context)
        body: dict[str, Any] = {"model": self._model, "stream": True, **_sampling_fields(sampling)}
        if self._settings.options.get("stream_options", True):
            body["stream_options"] = {"include_usage": True}
        if request.messages is not None:
            return "/chat/completions", body | _chat_fields(request)
        if sampling.json_schema is not None:
            raise InvalidRequest("A remote API takes a JSON schema for chats only.", param="response_format")
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
        prompt = request.prompt_text if request.prompt_text is not None else list(request.prompt_token_ids or ())
        return "/completions", body | {"prompt": prompt}

    async def _post(self, path: str, body: Mapping[str, Any]) -> aiohttp.ClientResponse:
        if self._http is None:
            raise EngineDead("The connection to the remote API is closed.")
        try:
            answer = await self._http.post(self._url + path, json=body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineFailed(f"{self._url} cannot be reached: {_reason(error)}") from error
        if answer.status == 200:
            return answer
        async with answer:
            retry_after_s = _seconds(answer.headers.get("retry-after", ""))
            raise self._refusal(answer.status, await answer.text(errors="replace"), retry_after_s)

    async def _models(self) -> list[Mapping[str, Any]]:
        if self._http is None:
            raise EngineDead("The connection to the remote API is closed.")
        limit = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
        try:
            async with self._http.get(f"{self._url}/models", timeout=limit) as answer:
                text = await answer.text(errors="replace")
                if answer.status != 200:
                    raise self._refusal(answer.status, text)
                return list(json.loads(text)["data"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineFailed(f"{self._url} cannot be reached: {_reason(error)}. Is the address right?") from error
        except (ValueError, KeyError, TypeError) as error:
            raise EngineFailed(f"{self._url}/models is no OpenAI list of models. Write the URL up to /v1.") from error

    def _told_context(self, models: list[Mapping[str, Any]]) -> int:
        entry = next((model for model in models if model.get("id") == self._model), None)
        if entry is None:
            names = ", ".join(sorted(str(model.get("id")) for model in models)[:20])
            raise ModelNotFound(f"{self._url} has no model {self._model!r}; it has: {names}. Set remote_model.")
        told = next((entry[name] for name in _CONTEXT_FIELDS if isinstance(entry.get(name), int)), None)
        if told is None:
            raise ClusterError(f"{self._url} does not say how long the context of {self._model!r} is. Set max_context.")
        return int(told)

    def _refusal(self, status: int, text: str, retry_after_s: int | None = None) -> ClusterError:
        error = _error_fields(text)
        message = f"{self._url} answers {status}: {error.get('message') or text[:300] or 'no reason given'}"
        if error.get("code") == "context_length_exceeded":
            return ContextTooLong(message)
        if status in (400, 413, 422):
            return InvalidRequest(message, param=error.get("param"))
        if status in (429, 503):
            return EngineBusy(message, retry_after_s=retry_after_s)
        if status in (401, 403):
            return EngineFailed(f"{message}. Set the key in the variable that remote_key_env names.")
        return EngineFailed(message)


async def _read_stream(answer: aiohttp.ClientResponse, logprobs: int | None) -> AsyncIterator[GenerationChunk]:
    """All chunks of a complete stream; the last one has finish reason and usage."""
    decoder = SseDecoder()
    finish_reason: str | None = None
    usage: Usage | None = None
    async for data in answer.content.iter_any():
        for event in _events(decoder, data):
            if event == "[DONE]":
                yield _last_chunk(finish_reason, usage)
                return
            chunk = _parse_event(event)
            if chunk.get("usage"):
                usage = _usage(chunk["usage"])
            for choice in chunk.get("choices") or ():
                finish_reason = choice.get("finish_reason") or finish_reason
                text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
                told = _logprobs(choice.get("logprobs")) if logprobs is not None else None
                if text or told:
                    yield GenerationChunk(text=text, logprobs=told)
    raise EngineFailed("The remote API ended its answer without [DONE]; what came is incomplete.")


def _events(decoder: SseDecoder, data: bytes) -> list[str]:
    try:
        return decoder.feed(data)
    except ValueError as error:
        raise EngineFailed(f"The remote API sent a malformed stream: {error}") from error


def _parse_event(event: str) -> dict[str, Any]:
    try:
        chunk = json.loads(event)
    except ValueError as error:
        raise EngineFailed(f"The remote API sent a malformed chunk: {event[:200]!r}") from error
    if not isinstance(chunk, dict):
        raise EngineFailed(f"The remote API sent a malformed chunk: {event[:200]!r}")
    if failure := chunk.get("error"):
        message = failure.get("message") if isinstance(failure, dict) else failure
        raise EngineFailed(f"The remote API failed in the middle of its answer: {message}")
    return chunk


def _last_chunk(finish_reason: str | None, usage: Usage | None) -> GenerationChunk:
    if finish_reason not in ("stop", "length"):
        raise EngineFailed(f"The remote API ended its answer with the reason {finish_reason!r}.")
    if usage is None:
        raise EngineFailed("The remote API sent no usage, so its answer cannot be counted.")
    return GenerationChunk(finish_reason=cast(FinishReason, finish_reason), usage=usage)


def _usage(told: Mapping[str, Any]) -> Usage:
    details = told.get("prompt_tokens_details") or {}
    return Usage(
        int(told.get("prompt_tokens") or 0),
        int(told.get("completion_tokens") or 0),
        int(details.get("cached_tokens") or 0),
    )


def _logprobs(told: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...] | None:
    if not told:
        return None
    if "content" in told:
        return tuple(
            TokenLogprob(
                None,
                entry["token"],
                entry["logprob"],
                tuple((top["token"], top["logprob"]) for top in entry.get("top_logprobs") or ()),
            )
            for entry in told["content"] or ()
        )
    tops = told.get("top_logprobs") or [{}] * len(told["tokens"])
    return tuple(
        TokenLogprob(None, token, logprob, tuple((top or {}).items()))
        for token, logprob, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
    )


def _sampling_fields(sampling: SamplingParams) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed")
    fields: dict[str, Any] = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    return fields


def _chat_fields(request: GenerationRequest) -> dict[str, Any]:
    sampling = request.sampling
    fields: dict[str, Any] = {"messages": [dict(message) for message in request.messages or ()]}
    if sampling.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    if sampling.json_schema is not None:
        schema = {"name": "answer", "schema": dict(sampling.json_schema), "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _estimate_tokens(request: GenerationRequest) -> int:
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    if request.messages is None:
        return -(-len((request.prompt_text or "").encode()) // _BYTES_PER_TOKEN)
    num_bytes = sum(
        len(json.dumps(message.get("content"), ensure_ascii=False).encode()) for message in request.messages
    )
    return -(-num_bytes // _BYTES_PER_TOKEN) + _TOKENS_PER_MESSAGE * len(request.messages)


def _error_fields(text: str) -> Mapping[str, Any]:
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {"message": str(error)}


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _seconds(retry_after: str) -> int | None:
    """Of a Retry-After header; one that names a date is left out."""
    return int(retry_after) if retry_after.isdecimal() else None


def _positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ClusterError(f"engine_options: silence_s is a number of seconds above 0, not {value!r}.")
    return float(value)
