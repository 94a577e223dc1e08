"""vLLM's asynchronous engine (version 0.29); what is private to vLLM is in the files `vllm*` here and in the plugin.

The engine runs in processes of its own. They are started by a thread that lives as long as the engine, because they are
told to end with it; stopping kills what is left of them. vLLM is imported at the start, after the environment that it
reads at import is set.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from cluster.chat_template import ChatTemplate, template_from_folder
from cluster.engine import (
    Delivered,
    EngineLoad,
    GenerationChunk,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    Usage,
)
from cluster.engines.admission import Admission
from cluster.engines.cache_use import CacheUse
from cluster.engines.descendants import descendants, end_processes
from cluster.engines.expert_balancer import is_balanced, num_redundant_experts
from cluster.engines.health_probe import HealthProbe
from cluster.engines.request_checks import answer_limit, check_request, check_token_ids
from cluster.engines.resumption import delivered_of, remaining_sampling
from cluster.engines.settings import EngineSettings
from cluster.engines.vllm_answers import chunk_of, end_ids_of, finish_reason_of, sampling_params
from cluster.engines.vllm_experts import (
    OutputCounts,
    check_held_experts,
    check_parts,
    needs_plugin,
    num_experts,
    read_worker_counts,
)
from cluster.engines.vllm_resumption import ContinuedText, continued_options, continues_guided_answers
from cluster.engines.vllm_start import Starter, VllmStart
from cluster.errors import (
    CannotContinue,
    ClusterError,
    EngineDead,
    EngineFailed,
    InvalidRequest,
    LoadUnavailable,
    ModelDamaged,
)
from cluster.expert_load import ExpertLoad
from cluster.model_identity import model_identity
from cluster.weights.safetensors_header import fingerprint

STOP_LIMIT_S = 10.0


class VllmEngine:
    """One Hugging Face checkpoint, up to `parallel_requests` generations in one batch."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._folder = Path(settings.location)
        self._vllm = VllmStart(settings)
        self._config = self._vllm.config
        self._template: ChatTemplate = template_from_folder(self._folder, model=settings.model)
        self._max_context = self._vllm.max_context
        settings.parallelism.check(
            num_layers=self._config.get("num_hidden_layers", 0),
            num_experts=num_experts(self._config),
            num_heads=self._config.get("num_attention_heads", 0),
            num_kv_heads=self._config.get("num_key_value_heads") or self._config.get("num_attention_heads", 0),
            num_redundant_experts=num_redundant_experts(settings.options),
        )
        self._admission = Admission(settings.parallel_requests, settings.max_queued_requests)
        self._cache_use = CacheUse()
        self._engine: Any = None
        self._starter: Starter | None = None
        self._tokenizer_thread: ThreadPoolExecutor | None = None
        self._probe: HealthProbe | None = None
        self._processes: list[psutil.Process] = []
        self._default_sampling: dict[str, Any] = {}
        self._end_ids: frozenset[int] = frozenset()
        self._continues_guided_answers = False
        self._checkpoint = fingerprint(self._folder) if num_experts(self._config) else ""
        self._identity = model_identity(self._folder, settings.options)
        self._output_counts: OutputCounts | None = None

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            model=self._settings.model,
            engine="vllm",
            max_context=self._max_context,
            max_concurrency=self._settings.parallel_requests,
            continues_answers=True,
            continues_guided_answers=self._continues_guided_answers,
            identity=self._identity,
            checkpoint=self._checkpoint,
            template_knows_tools=self._template.knows_tools,
        )

    @property
    def load(self) -> EngineLoad:
        cache = self._cache_use
        return EngineLoad(self._admission.num_running, self._admission.num_queued, cache.num_tokens, cache.max_tokens)

    async def start(self) -> None:
        others = {process.pid for process in descendants()}
        self._starter = Starter(self._vllm.load)
        try:
            self._engine = await asyncio.wrap_future(self._starter.result)
        except ClusterError:
            await self.stop()
            raise
        except (RuntimeError, ValueError, OSError) as error:
            await self.stop()
            raise ModelDamaged(
                f"vLLM cannot load {self._folder}: {error}. Its log above says more; check the files, the memory and "
                "engine_options."
            ) from error
        finally:
            self._processes = [process for process in descendants() if process.pid not in others]
        try:
            await self._check_experts()
        except BaseException:
            await self.stop()
            raise
        cache = self._engine.vllm_config.cache_config
        self._cache_use.max_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        self._default_sampling = dict(self._engine.model_config.get_diff_sampling_param())
        self._end_ids = end_ids_of(self._engine)
        self._continues_guided_answers = continues_guided_answers()
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        # A question that travels through the engine process's own loop and back.
        self._probe = HealthProbe("vLLM", self._engine.is_sleeping)

    async def stop(self) -> None:
        engine, self._engine = self._engine, None
        starter, self._starter = self._starter, None
        tokenizer_thread, self._tokenizer_thread = self._tokenizer_thread, None
        processes, self._processes = self._processes, []
        if self._probe is not None:
            self._probe.close()
        if engine is not None:
            await asyncio.to_thread(engine.shutdown, timeout=STOP_LIMIT_S)
        await asyncio.to_thread(end_processes, processes, STOP_LIMIT_S)
        if starter is not None:
            starter.release()
        if tokenizer_thread is not None:
            tokenizer_thread.shutdown(wait=False)

    async def _check_experts(self) -> None:
        """And begin to count what is counted here."""
        parallelism = self._settings.parallelism
        if not num_experts(self._config):
            return
        if self._vllm.is_cpu and needs_plugin(parallelism):
            await check_parts(self._engine)
            await check_held_experts(self._engine, parallelism, self._config)
        elif getattr(self._engine.model_config, "enable_return_routed_experts", False):
            self._output_counts = OutputCounts(
                parallelism, self._config, is_balanced=is_balanced(self._settings.options)
            )

    async def expert_load(self) -> ExpertLoad | None:
        """See the contract. In a gang: of the tokens that this engine's own requests brought."""
        if not num_experts(self._config):
            return None
        if not self._settings.parallelism.count_experts:
            raise LoadUnavailable(f"{self._settings.model} counts no experts: it was started with that turned off.")
        if self._engine is None:
            raise EngineDead("vLLM is not running.")
        if self._output_counts is not None:
            return self._output_counts.load()
        if not self._vllm.is_cpu:
            raise LoadUnavailable(f"{self._settings.model}: engine_options turn enable_return_routed_experts off.")
        return await read_worker_counts(self._engine, self._settings.parallelism, self._config)

    async def check_health(self) -> None:
        if self._engine is None or self._probe is None:
            raise EngineDead("vLLM is not running.")
        if self._engine.errored:
            raise EngineDead("vLLM's engine process has ended.")
        await self._probe.check()

    async def tokenize(self, text: str) -> list[int]:
        return await self._tokenize(text, add_special=False)

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        check_request(request)
        return len(await self._prompt_ids(request))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """See the contract. Closing the iterator aborts the request in the engine."""
        check_request(request)
        prompt_ids = await self._prompt_ids(request)
        check_token_ids(list(request.sampling.logit_bias or ()), self._vocabulary_size, param="logit_bias")
        max_tokens = answer_limit(len(prompt_ids), request.sampling.max_tokens, self._max_context)
        delivered = delivered_of(request)
        sampling = remaining_sampling(request.sampling, delivered, max_tokens)
        text: ContinuedText | None = None
        if delivered.token_ids:
            text = self._continue(prompt_ids, request.sampling, delivered, max_tokens)
            due, reason = text.caught_up
            if reason is not None:
                yield GenerationChunk(text=due)
                yield GenerationChunk(finish_reason=reason, usage=Usage(len(prompt_ids), len(delivered.token_ids)))
                return
        params = sampling_params(sampling, self._default_sampling, continued_options(delivered) if text else {})
        await self._admission.acquire()
        try:
            with self._cache_use.hold(len(prompt_ids) + len(delivered.token_ids)) as held:
                async for chunk in self._stream(prompt_ids, params, request, text):
                    held.add(len(chunk.token_ids))
                    yield chunk
        finally:
            self._admission.release()

    def _continue(
        self, prompt_ids: list[int], sampling: SamplingParams, delivered: Delivered, max_tokens: int
    ) -> ContinuedText:
        check_token_ids(delivered.token_ids, self._vocabulary_size, param="delivered")
        is_guided = sampling.json_schema is not None or sampling.grammar is not None
        if is_guided and not self._continues_guided_answers:
            raise CannotContinue(
                "The answer is bound to a grammar, and windfarm's plugin, which brings it to the middle of an answer, "
                "does not know this version of vLLM."
            )
        if self._engine is None:
            raise EngineDead("vLLM is not running.")
        end_ids = frozenset() if sampling.ignore_eos else self._end_ids
        tokenizer = self._engine.get_tokenizer()
        return ContinuedText(tokenizer, prompt_ids, sampling, delivered, max_tokens, end_ids)

    async def _stream(
        self, prompt_ids: list[int], params: Any, request: GenerationRequest, text: ContinuedText | None
    ) -> AsyncIterator[GenerationChunk]:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self._engine is None or self._probe is None:
            raise EngineDead("vLLM is not running.")
        # Clients choose request ids; vLLM takes each only once at a time.
        delivered_ids = delivered_of(request).token_ids
        outputs = self._engine.generate(
            tokens_input([*prompt_ids, *delivered_ids]),
            params,
            request_id=f"{request.request_id}-{os.urandom(6).hex()}",
        )
        num_tokens = len(delivered_ids)
        try:
            if text is not None and text.caught_up.due:
                yield GenerationChunk(text=text.caught_up.due)
            async for output in outputs:
                self._probe.note_life()
                completion = output.outputs[0]
                num_new = len(completion.token_ids)
                if self._output_counts is not None and completion.routed_experts is not None:
                    self._output_counts.note(completion.routed_experts, output.num_cached_tokens or 0)
                shown, reason = completion.text, completion.finish_reason
                if text is not None:
                    shown, num_new = text.feed(completion.token_ids, ends_with_stop_token=reason == "stop")
                    reason = "stop" if text.has_stopped else reason
                    shown += text.finish() if reason is not None else ""
                num_tokens += num_new
                yield chunk_of(completion, num_new, shown, request.sampling.logprobs)
                if reason is not None:
                    usage = Usage(len(prompt_ids), num_tokens, min(output.num_cached_tokens or 0, len(prompt_ids)))
                    yield GenerationChunk(finish_reason=finish_reason_of(reason), usage=usage)
                    return
            raise EngineFailed("vLLM ended the answer without saying why.")
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine process has ended.") from error
        except EngineGenerateError as error:
            raise EngineFailed(f"vLLM failed: {error.__cause__ or error}") from error
        except (VLLMClientError, ValueError) as error:
            raise InvalidRequest(f"vLLM refuses the request: {error}") from error
        finally:
            await outputs.aclose()

    @property
    def _vocabulary_size(self) -> int:
        return int(self._config["vocab_size"])

    async def _prompt_ids(self, request: GenerationRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            ids = list(request.prompt_token_ids)
            check_token_ids(ids, self._vocabulary_size, param="prompt")
            return ids
        if request.messages is not None:
            return await self._tokenize(self._template.render(request.messages, request.tools), add_special=False)
        return await self._tokenize(request.prompt_text or "", add_special=True)

    async def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """In one thread: tokenizers may not be used from several at once."""
        if self._engine is None or self._tokenizer_thread is None:
            raise EngineDead("vLLM is not running.")
        tokenizer = self._engine.get_tokenizer()
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizer_thread, lambda: list(tokenizer.encode(text, add_special_tokens=add_special))
        )
