"""llama.cpp in our own process, through `xllamacpp`; everything private to that package is in this file.

Its calls block, so each running generation has a thread; tokens reach the event loop through one mailbox, where one
wake-up serves several tokens. Its server always opens an HTTP port: that one stays on loopback behind a random key and
serves tokenization. Stop strings are matched here, because llama.cpp drops text that it holds back when the answer ends
at its limit. Log-probabilities of characters that took several tokens are those of the last one.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp

from cluster.chat_template import ChatTemplate, template_from_gguf
from cluster.engine import (
    Delivered,
    EngineLoad,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from cluster.engines.admission import Admission
from cluster.engines.cache_use import CacheUse
from cluster.engines.health_probe import HealthProbe
from cluster.engines.llamacpp_mailbox import Call, End, Mailbox, wake
from cluster.engines.llamacpp_turns import Turns
from cluster.engines.memory import DEFAULT_CONTEXT, context_of
from cluster.engines.openmp import SpinGovernor, is_spinning_governed, prepare_governed_spinning
from cluster.engines.request_checks import answer_limit, check_request, check_token_ids
from cluster.engines.resumption import catch_up, decode_pieces, delivered_of, remaining_sampling
from cluster.engines.settings import EngineSettings
from cluster.engines.stop_strings import StopMatcher
from cluster.engines.structured_output import json_schema_grammar
from cluster.engines.vocabulary import Vocabulary, hidden_token_ids
from cluster.errors import (
    CannotContinue,
    ClusterError,
    ContextTooLong,
    EngineDead,
    EngineFailed,
    InvalidRequest,
    LoadUnavailable,
    ModelDamaged,
)
from cluster.expert_load import ExpertLoad
from cluster.gguf_metadata import GgufMetadata, read_gguf_metadata
from cluster.model_identity import model_identity

# Tokens of prompts that are computed at once. After each batch the answers that run get a token, a shorter prompt may
# go first, and a client that is gone is noticed. With 512 a prompt alone was not faster.
PROMPT_BATCH = 128
PROMPT_CACHE_MIB = 256

_OWNED_OPTIONS = {"model", "port", "hostnames", "api_keys", "n_ctx", "n_parallel", "model_alias", "endpoint_metrics"}


class LlamaCppEngine:
    """One GGUF model with `parallel_requests` slots, each with the whole context."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._path = Path(settings.location)
        self._metadata: GgufMetadata = read_gguf_metadata(self._path)
        self._identity = model_identity(self._path, settings.options)
        self._vocabulary = Vocabulary(self._metadata)
        self._template: ChatTemplate = template_from_gguf(self._metadata, model=settings.model)
        trained = self._metadata.max_context
        self._max_context = context_of(settings.model, settings.max_context, trained) or DEFAULT_CONTEXT
        self._admission = Admission(settings.parallel_requests, settings.max_queued_requests)
        self._cache_use = CacheUse(self._max_context * settings.parallel_requests)
        self._key = secrets.token_hex(16)
        self._library = _load_library()
        self._params = self._parameters()
        self._server: Any = None
        self._http: aiohttp.ClientSession | None = None
        self._mailbox: Mailbox | None = None
        self._turns = Turns()
        self._workers: ThreadPoolExecutor | None = None
        self._probe = HealthProbe("llama.cpp", self._ask)
        self._spinning: SpinGovernor | None = None

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            model=self._settings.model,
            engine="llamacpp",
            max_context=self._max_context,
            max_concurrency=self._settings.parallel_requests,
            continues_answers=True,
            identity=self._identity,
            template_knows_tools=self._template.knows_tools,
        )

    @property
    def load(self) -> EngineLoad:
        cache = self._cache_use
        return EngineLoad(self._admission.num_running, self._admission.num_queued, cache.num_tokens, cache.max_tokens)

    async def start(self) -> None:
        self._mailbox = Mailbox(asyncio.get_running_loop())
        if is_spinning_governed():
            self._spinning = SpinGovernor(self._params.cpuparams.n_threads)
        # One thread per slot, and one for health.
        self._workers = ThreadPoolExecutor(self._settings.parallel_requests + 1, thread_name_prefix="llamacpp")
        try:
            self._server = await asyncio.get_running_loop().run_in_executor(
                self._workers, self._library.Server, self._params
            )
        except (RuntimeError, ValueError) as error:
            await self.stop()
            raise ModelDamaged(
                f"llama.cpp cannot load {self._path}: {error}. Check the file, and that memory suffices."
            ) from error
        # One connection per request: its server closes idle ones after seconds, and a request sent just then is lost.
        self._http = aiohttp.ClientSession(
            self._server.listening_address,
            headers={"Authorization": f"Bearer {self._key}"},
            connector=aiohttp.TCPConnector(force_close=True),
        )

    async def stop(self) -> None:
        server, self._server = self._server, None
        spinning, self._spinning = self._spinning, None
        http, self._http = self._http, None
        workers, self._workers = self._workers, None
        if self._mailbox is not None:
            self._mailbox.close("The engine was stopped.")
        if http is not None:
            await http.close()
        if workers is not None:
            # The threads leave at the next token; the server can only go after they did.
            await asyncio.to_thread(workers.shutdown, wait=True)
        if server is not None:
            holder = [server]
            del server
            await asyncio.to_thread(holder.clear)  # its destructor waits for the engine's loop
        if spinning is not None:
            spinning.close()

    async def check_health(self) -> None:
        if self._server is None:
            raise EngineDead("llama.cpp is not running.")
        await self._probe.check()

    async def expert_load(self) -> ExpertLoad | None:
        if self._metadata.num_experts < 2:
            return None
        raise LoadUnavailable(
            f"{self._settings.model} has {self._metadata.num_experts} experts, but llama.cpp does not count them; run "
            "it with engine: vllm from a Hugging Face checkpoint."
        )

    async def _ask(self) -> None:
        """A question that the engine's own loop answers between two computations."""
        assert self._server is not None and self._workers is not None
        await asyncio.get_running_loop().run_in_executor(self._workers, self._server.handle_metrics)

    async def tokenize(self, text: str) -> list[int]:
        return await self._tokenize(text, add_special=False, parse_special=False)

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        check_request(request)
        return len(await self._prompt_ids(request))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """See the contract. Closing the iterator frees the slot at the engine's next token."""
        check_request(request)
        prompt_ids = await self._prompt_ids(request)
        check_token_ids(list(request.sampling.logit_bias or ()), len(self._vocabulary), param="logit_bias")
        max_tokens = answer_limit(len(prompt_ids), request.sampling.max_tokens, self._max_context)
        delivered = delivered_of(request)
        reader = _ChunkReader(request.sampling, self._vocabulary, len(prompt_ids), len(delivered.token_ids))
        due: list[GenerationChunk] = []
        if delivered.token_ids:
            self._check_continuation(request.sampling, delivered)
            end_ids = frozenset() if request.sampling.ignore_eos else self._vocabulary.end_ids
            due = reader.catch_up(delivered, max_tokens, end_ids)
        if reader.is_finished:
            for chunk in due:
                yield chunk
            return
        body = _completion_body(
            [*prompt_ids, *delivered.token_ids], remaining_sampling(request.sampling, delivered, max_tokens)
        )
        await self._admission.acquire()
        call = self._submit(body)
        try:
            with self._cache_use.hold(len(prompt_ids) + len(delivered.token_ids)) as held:
                for chunk in due:
                    yield chunk
                while not reader.is_finished:
                    for chunk in reader.read(await call.next_items()):
                        held.add(len(chunk.token_ids))
                        yield chunk
        finally:
            call.cancel()

    def _check_continuation(self, sampling: SamplingParams, delivered: Delivered) -> None:
        check_token_ids(delivered.token_ids, len(self._vocabulary), param="delivered")
        if sampling.json_schema is not None or sampling.grammar is not None:
            raise CannotContinue(
                "The answer is bound to a grammar, and llama.cpp cannot bring a grammar to the middle of an answer."
            )

    def _submit(self, body: dict[str, Any]) -> Call:
        """Run one generation in a worker thread; its slot is given back when the thread has left the engine."""
        if self._server is None or self._mailbox is None or self._workers is None:
            self._admission.release()
            raise EngineDead("llama.cpp is not running.")
        if self._spinning is not None and self._admission.num_running == 1:
            self._spinning.begin()
        call = Call(self._mailbox, self._turns, self._note_token)
        self._mailbox.open(call)
        loop = asyncio.get_running_loop()
        future: Future[None] = self._workers.submit(call.run, self._server.handle_completions, body)
        future.add_done_callback(lambda _: wake(loop, self._admission.release))
        return call

    def _note_token(self) -> None:
        """In the thread of a generation, for each token."""
        self._probe.note_life()
        if self._spinning is not None:
            self._spinning.adapt()

    async def _prompt_ids(self, request: GenerationRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            ids = list(request.prompt_token_ids)
            check_token_ids(ids, len(self._vocabulary), param="prompt")
            return ids
        if request.messages is not None:
            text = self._template.render(request.messages, request.tools)
            return await self._tokenize(text, add_special=False, parse_special=True)
        return await self._tokenize(request.prompt_text or "", add_special=True, parse_special=True)

    async def _tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if self._http is None:
            raise EngineDead("llama.cpp is not running.")
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        try:
            async with self._http.post("/tokenize", json=body) as answer:
                answer.raise_for_status()
                return list((await answer.json())["tokens"])
        except aiohttp.ClientError as error:
            raise EngineFailed(f"llama.cpp could not tokenize the prompt: {error}") from error

    def _parameters(self) -> Any:
        settings = self._settings
        params = self._library.CommonParams()
        params.model.path = str(self._path)
        params.model_alias = {settings.model}
        params.hostnames = ["127.0.0.1"]
        params.port = 0
        params.api_keys = [self._key]
        params.ui = False
        params.endpoint_slots = False
        params.endpoint_metrics = True
        params.n_threads_http = 2
        params.verbosity = 1
        params.n_parallel = settings.parallel_requests
        params.n_ctx = self._max_context * settings.parallel_requests
        params.n_batch = PROMPT_BATCH
        params.cache_ram_mib = PROMPT_CACHE_MIB
        params.fit_params = False  # it may shrink the context silently
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads or os.cpu_count() or 1
        for name, value in settings.options.items():
            _set_option(params, name, value)
        return params


class _ChunkReader:
    """Turns llama.cpp's answers for one request into chunks: token ids, stop strings, usage."""

    def __init__(
        self, sampling: SamplingParams, vocabulary: Vocabulary, num_prompt_tokens: int, num_delivered: int = 0
    ) -> None:
        self._vocabulary = vocabulary
        self._num_prompt_tokens = num_prompt_tokens
        self._num_delivered = num_delivered
        self._num_cached_tokens: int | None = None
        self._num_tokens = 0
        """Of this engine: what was delivered before is not among them."""
        self._stops = StopMatcher(sampling.stop)
        self._num_alternatives = sampling.logprobs
        self.is_finished = False

    def catch_up(self, delivered: Delivered, max_tokens: int, end_ids: Container[int]) -> list[GenerationChunk]:
        """What is due of an answer that another engine began; with the last chunk where that was all of it."""
        spelled = map(self._vocabulary.shown_bytes, delivered.token_ids)
        due, reason = catch_up(decode_pieces(spelled), self._stops, delivered, max_tokens, end_ids)
        self.is_finished = reason is not None
        chunks = [GenerationChunk(text=due)] if due else []
        return [*chunks, self._last(reason)] if reason is not None else chunks

    def read(self, items: list[Any]) -> list[GenerationChunk]:
        """One chunk for all tokens in `items`, and the last chunk when the generation ended."""
        token_ids: list[int] = []
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        last: GenerationChunk | None = None
        for item in items:
            if isinstance(item, End):
                raise item.error or EngineFailed("llama.cpp ended the answer without saying why.")
            if "error" in item:
                raise _error_from(item["error"])
            if "prompt_progress" in item:
                self._note_cached(item["prompt_progress"]["cache"])
                continue
            choice, details = item["choices"][0], item["__verbose"]
            token_ids += self._token_ids(details)
            logprobs += _logprobs(choice.get("logprobs"), self._num_alternatives)
            texts.append(self._stops.feed(choice["text"]))
            if self._stops.matched is not None:
                last = self._last("stop")
            elif choice["finish_reason"] is not None:
                texts.append(self._stops.finish())
                self._note_cached(item["usage"]["prompt_tokens_details"]["cached_tokens"])
                last = self._last(choice["finish_reason"])
            if last is not None:
                break
        self.is_finished = last is not None
        chunks = [last] if last else []
        if token_ids or any(texts):
            probabilities = tuple(logprobs) if self._num_alternatives is not None else None
            chunks.insert(0, GenerationChunk(tuple(token_ids), "".join(texts), probabilities))
        return chunks

    def _note_cached(self, num_tokens: int) -> None:
        """What is said first holds: for a prompt that gave way to another, its own work is cached later."""
        if self._num_cached_tokens is None:
            self._num_cached_tokens = num_tokens

    def _token_ids(self, details: Mapping[str, Any]) -> tuple[int, ...]:
        """Ids of a partial answer, with those that llama.cpp swallowed while a character was incomplete."""
        shown = tuple(details["tokens"])
        num_hidden = details["tokens_predicted"] - self._num_tokens - len(shown)
        self._num_tokens = details["tokens_predicted"]
        if details["stop"] or num_hidden <= 0:
            return shown
        return hidden_token_ids(self._vocabulary, details["content"], shown, num_hidden) + shown

    def _last(self, reason: FinishReason) -> GenerationChunk:
        num_cached = min(self._num_cached_tokens or 0, self._num_prompt_tokens)
        usage = Usage(self._num_prompt_tokens, self._num_delivered + self._num_tokens, num_cached)
        return GenerationChunk(finish_reason=reason, usage=usage)


def _completion_body(prompt_ids: list[int], sampling: SamplingParams) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": prompt_ids,
        "max_tokens": sampling.max_tokens,
        "stream": True,
        "verbose": True,  # brings the token ids
        "return_tokens": True,
        "return_progress": True,  # a callback per batch of the prompt: a chance to cancel
        "cache_prompt": True,
        "ignore_eos": sampling.ignore_eos,
    }
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "grammar")
    body |= {name: value for name in names if (value := getattr(sampling, name)) is not None}
    if sampling.seed is not None:
        body["seed"] = sampling.seed % 0xFFFFFFFF  # 2**32 - 1 means "random"
    if sampling.logit_bias:
        body["logit_bias"] = [[token_id, bias] for token_id, bias in sampling.logit_bias.items()]
    if sampling.logprobs is not None:
        body["logprobs"] = max(1, sampling.logprobs)
    if sampling.json_schema is not None:
        body["grammar"] = json_schema_grammar(sampling.json_schema)
    return body


def _logprobs(answer: Mapping[str, Any] | None, num_alternatives: int | None) -> list[TokenLogprob]:
    if not answer or num_alternatives is None:
        return []
    return [
        TokenLogprob(
            entry["id"],
            entry["token"],
            entry["logprob"],
            tuple((top["token"], top["logprob"]) for top in entry["top_logprobs"][:num_alternatives]),
        )
        for entry in answer["content"]
    ]


def _error_from(error: Mapping[str, Any]) -> ClusterError:
    message = str(error.get("message", error))
    if error.get("type") == "exceed_context_size_error":
        return ContextTooLong(f"llama.cpp: {message}")
    if error.get("code") == 400:
        return InvalidRequest(f"llama.cpp refuses the request: {message}")
    return EngineFailed(f"llama.cpp failed: {message}")


def _load_library() -> Any:
    """Imported late: OpenMP reads its settings once, when the first library that uses it is loaded."""
    prepare_governed_spinning()
    import xllamacpp

    return xllamacpp


def _set_option(params: Any, name: str, value: Any) -> None:
    if name in _OWNED_OPTIONS or name.startswith("_") or not hasattr(params, name):
        raise ClusterError(
            f"engine_options: llama.cpp has no option {name!r} that can be set here. "
            "See the names of xllamacpp.CommonParams."
        )
    try:
        setattr(params, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise ClusterError(f"engine_options: {name} cannot be {json.dumps(value, default=str)}: {error}") from error
