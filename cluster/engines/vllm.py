"""vLLM's asynchronous engine (version 0.29); everything private to vLLM is in this file and the plugin.

The engine runs in processes of its own. They are started by a thread that lives as long as the engine, because they are
told to end with it; stopping kills what is left of them. vLLM is imported at the start, after the environment that it
reads at import is set.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import psutil

from cluster.chat_template import ChatTemplate, template_from_folder
from cluster.engine import (
    Delivered,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from cluster.engines.admission import Admission
from cluster.engines.expert_balancer import is_balanced, num_redundant_experts
from cluster.engines.health_probe import HealthProbe
from cluster.engines.openmp import limit_spinning
from cluster.engines.request_checks import MAX_LOGPROBS, answer_limit, check_request, check_token_ids
from cluster.engines.resumption import delivered_of, remaining_sampling
from cluster.engines.settings import EngineSettings
from cluster.engines.structured_output import compact_schema, json_schema_grammar
from cluster.engines.vllm_experts import (
    OutputCounts,
    check_parts,
    expert_options,
    needs_plugin,
    num_experts,
    read_worker_counts,
)
from cluster.engines.vllm_resumption import ContinuedText, continued_options, continues_guided_answers
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
from cluster.vllm_plugin.closed_stores import closed_stores_option
from cluster.vllm_plugin.end_with_parent import PARENT_VARIABLE
from cluster.weights.safetensors_header import fingerprint

STOP_LIMIT_S = 10.0
# vLLM measures free GPU memory itself; on a CPU it would take most of the machine.
_CPU_CACHE_SHARE = 0.25

_OWNED_OPTIONS = {
    "model",
    "served_model_name",
    "max_model_len",
    "max_num_seqs",
    "tokenizer",
    "worker_extension_cls",
    "additional_config",
    "tensor_parallel_size",
    "enable_expert_parallel",
    *(f"data_parallel_{name}" for name in ("size", "rank", "address", "rpc_port", "external_lb", "hybrid_lb")),
}


class VllmEngine:
    """One Hugging Face checkpoint, up to `parallel_requests` generations in one batch."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._folder = Path(settings.location)
        self._config = _read_config(self._folder)
        self._template: ChatTemplate = template_from_folder(self._folder, model=settings.model)
        self._max_context = _max_context(settings, self._config)
        settings.parallelism.check(
            num_layers=self._config.get("num_hidden_layers", 0),
            num_experts=num_experts(self._config),
            num_heads=self._config.get("num_attention_heads", 0),
            num_redundant_experts=num_redundant_experts(settings.options),
        )
        self._admission = Admission(settings.parallel_requests, settings.max_queued_requests)
        self._engine: Any = None
        self._starter: _Starter | None = None
        self._tokenizer_thread: ThreadPoolExecutor | None = None
        self._probe: HealthProbe | None = None
        self._processes: list[psutil.Process] = []
        self._default_sampling: dict[str, Any] = {}
        self._end_ids: frozenset[int] = frozenset()
        self._continues_guided_answers = False
        self._is_cpu = False
        self._checkpoint = fingerprint(self._folder) if num_experts(self._config) else ""
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
            checkpoint=self._checkpoint,
            template_knows_tools=self._template.knows_tools,
        )

    @property
    def load(self) -> tuple[int, int]:
        return self._admission.num_running, self._admission.num_queued

    async def start(self) -> None:
        others = {process.pid for process in _descendants()}
        self._starter = _Starter(self._load)
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
            self._processes = [process for process in _descendants() if process.pid not in others]
        try:
            await self._begin_counting()
        except BaseException:
            await self.stop()
            raise
        self._default_sampling = dict(self._engine.model_config.get_diff_sampling_param())
        self._end_ids = _end_ids(self._engine)
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
        await asyncio.to_thread(_end_processes, processes)
        if starter is not None:
            starter.release()
        if tokenizer_thread is not None:
            tokenizer_thread.shutdown(wait=False)

    async def _begin_counting(self) -> None:
        parallelism = self._settings.parallelism
        if not num_experts(self._config):
            return
        if self._is_cpu and needs_plugin(parallelism):
            await check_parts(self._engine)
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
        if not self._is_cpu:
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
        params = _sampling_params(sampling, self._default_sampling, continued_options(delivered) if text else {})
        await self._admission.acquire()
        try:
            async for chunk in self._stream(prompt_ids, params, request, text):
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
                num_tokens += len(completion.token_ids)
                if self._output_counts is not None and completion.routed_experts is not None:
                    self._output_counts.note(completion.routed_experts)
                shown, reason = completion.text, completion.finish_reason
                if text is not None:
                    shown = text.feed(completion.token_ids, ends_with_stop_token=reason == "stop")
                    reason = "stop" if text.has_stopped else reason
                    shown += text.finish() if reason is not None else ""
                yield _chunk(completion, shown, request.sampling.logprobs)
                if reason is not None:
                    usage = Usage(len(prompt_ids), num_tokens, min(output.num_cached_tokens or 0, len(prompt_ids)))
                    yield GenerationChunk(finish_reason=_finish_reason(reason), usage=usage)
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

    def _load(self) -> Any:
        """In the starter thread: returns when vLLM can generate."""
        _set_environment(self._settings)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        options: dict[str, Any] = {
            "model": str(self._folder),
            "served_model_name": [self._settings.model],
            "max_model_len": self._max_context,
            "max_num_seqs": self._settings.parallel_requests,
            "max_logprobs": MAX_LOGPROBS,
            "structured_outputs_config": {"backend": "guidance"},
            "disable_log_stats": True,
            **self._settings.parallelism.engine_arguments(),
        }
        self._is_cpu = current_platform.is_cpu()
        if num_experts(self._config):
            options |= expert_options(self._settings.parallelism, is_cpu=self._is_cpu)
        options["additional_config"] = options.get("additional_config", {}) | closed_stores_option()
        if self._is_cpu:
            options["kv_cache_memory_bytes"] = _cpu_cache_bytes(self._settings, self._config, self._max_context)
            # Compiling takes longer than loading the model.
            options["enforce_eager"] = True
        known = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - _OWNED_OPTIONS
        for name, value in self._settings.options.items():
            if name not in known:
                raise ValueError(f"engine_options: vLLM has no option {name!r} that can be set here")
            options[name] = value
        if self._is_cpu and options["enforce_eager"]:
            # Parts of the sampler would compile at their first use.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))


class _Starter:
    """A thread that makes the engine and lives until it is released: the engine's processes end with it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.result: Future[Any] = Future()
        self._make = make
        self._released = threading.Event()
        threading.Thread(target=self._run, name="vllm starter", daemon=True).start()

    def release(self) -> None:
        self._released.set()

    def _run(self) -> None:
        try:
            self.result.set_result(self._make())
        except BaseException as error:  # noqa: BLE001  # whoever awaits the result gets it
            self.result.set_exception(error)
        self._released.wait()


def _chunk(completion: Any, text: str, num_alternatives: int | None) -> GenerationChunk:
    token_ids = tuple(completion.token_ids)
    logprobs = None
    if num_alternatives is not None and completion.logprobs is not None:
        pairs = zip(token_ids, completion.logprobs, strict=False)
        logprobs = tuple(_logprob(token_id, entry, num_alternatives) for token_id, entry in pairs)
    return GenerationChunk(token_ids, text, logprobs)


def _logprob(token_id: int, entry: Mapping[int, Any], num_alternatives: int) -> TokenLogprob:
    """vLLM gives the chosen token and the best ones in one dictionary."""
    best = sorted(entry.values(), key=lambda alternative: -alternative.logprob)[:num_alternatives]
    chosen = entry[token_id]
    top = tuple((alternative.decoded_token or "", alternative.logprob) for alternative in best)
    return TokenLogprob(token_id, chosen.decoded_token or "", chosen.logprob, top)


def _finish_reason(reason: str) -> FinishReason:
    if reason not in ("stop", "length"):
        raise EngineFailed(f"vLLM ended the answer: {reason}.")
    return cast(FinishReason, reason)


def _end_ids(engine: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of the checkpoint's generation_config.json."""
    told = engine.model_config.try_get_generation_config().get("eos_token_id")
    ids = told if isinstance(told, list) else [told]
    return frozenset(token_id for token_id in [*ids, engine.get_tokenizer().eos_token_id] if token_id is not None)


def _sampling_params(sampling: SamplingParams, defaults: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
    """vLLM's parameters. `others` are further ones of vLLM itself, which win."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

    values = dict(defaults)
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "logprobs")
    values |= {name: value for name in names if (value := getattr(sampling, name)) is not None}
    values["top_p"] = max(values.get("top_p", 1.0), 1e-6)  # vLLM refuses 0
    if sampling.json_schema is not None:
        json_schema_grammar(sampling.json_schema)  # the same errors as with the other engines
        values["structured_outputs"] = StructuredOutputsParams(json=compact_schema(sampling.json_schema))
    if sampling.grammar is not None:
        values["structured_outputs"] = StructuredOutputsParams(grammar=sampling.grammar)
    values |= {
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "logit_bias": dict(sampling.logit_bias) if sampling.logit_bias else None,
        "ignore_eos": sampling.ignore_eos,
        "output_kind": RequestOutputKind.DELTA,
        **others,
    }
    try:
        return VllmSamplingParams(**values)
    except ValueError as error:
        raise InvalidRequest(f"vLLM refuses the request: {error}") from error


def _set_environment(settings: EngineSettings) -> None:
    """What vLLM and its processes read from the environment; only one engine runs in a process."""
    limit_spinning()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Ray sets one thread per CPU that the replica asked for, which may be a fraction. The ranks here share them.
    threads = settings.threads or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // settings.parallelism.tensor_parallel_size))
    # Other engines and the endpoint share these cores; a thread bound to a busy core holds up all others.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelDamaged(f"{file} cannot be read ({error}). Prepare or copy the model again.") from error
    return {**config, **config.get("text_config", {})}


def _max_context(settings: EngineSettings, config: Mapping[str, Any]) -> int:
    trained = config.get("max_position_embeddings")
    wanted = settings.max_context or trained
    if wanted is None:
        raise ClusterError(f"The config.json of {settings.model} names no context length. Set max_context.")
    if trained is not None and wanted > trained:
        raise ClusterError(
            f"max_context of {settings.model} is {wanted}, but the model was trained for {trained} tokens. "
            f"Set max_context to {trained} or less."
        )
    return int(wanted)


def _cpu_cache_bytes(settings: EngineSettings, config: Mapping[str, Any], max_context: int) -> int:
    """Of one rank: room for half of all contexts at their full length, within a share of the machine, but for one in
    any case. Ranks share the key-value heads out as long as there are enough."""
    ranks = settings.parallelism.tensor_parallel_size
    heads = config["num_attention_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // heads
    values = 2 * config["num_hidden_layers"] * -(-(config.get("num_key_value_heads") or heads) // ranks) * head_width
    # vLLM keeps float32 weights in half precision unless it is told otherwise. One block more: it rounds up.
    one_context = (max_context + 256) * values * (4 if settings.options.get("dtype") in ("float32", "float") else 2)
    share = int(psutil.virtual_memory().total * _CPU_CACHE_SHARE) // ranks
    return max(one_context, min(one_context * ((settings.parallel_requests + 1) // 2), share))


def _descendants() -> list[psutil.Process]:
    """All but Python's own helper, which serves the whole process."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if not _is_resource_tracker(child)]


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _end_processes(processes: list[psutil.Process]) -> None:
    """vLLM's own shutdown leaves processes behind now and then."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=STOP_LIMIT_S)
