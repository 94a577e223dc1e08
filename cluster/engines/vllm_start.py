"""How vLLM is started: what of the settings and the machine becomes which of its options."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cluster.engines.memory import context_of, facts_of_config, read_model_config, vllm_cpu_cache_bytes
from cluster.engines.openmp import let_children_be_governed, limit_spinning
from cluster.engines.request_checks import MAX_LOGPROBS
from cluster.engines.settings import EngineSettings
from cluster.engines.vllm_experts import expert_options, num_experts
from cluster.errors import ClusterError
from cluster.sizing import STEP_TOKENS
from cluster.vllm_plugin.closed_stores import closed_stores_option
from cluster.vllm_plugin.end_with_parent import PARENT_VARIABLE
from cluster.vllm_plugin.versions import is_known_version

# Tokens of one prompt in one step; the rest waits for the next ones. The step has room for more, so that short prompts
# are computed beside a long one, and running answers get their next token soon. So many fill the cores of a CPU.
_CPU_PROMPT_CHUNK = 128
_GPU_PROMPT_CHUNK = 1024

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


class VllmStart:
    """What is known before vLLM is there; `is_cpu` is known after `load`."""

    def __init__(self, settings: EngineSettings) -> None:
        """Raises `ModelDamaged`, or `ClusterError` where the context cannot be as long."""
        self._settings = settings
        self._folder = Path(settings.location)
        self.config = read_model_config(self._folder)
        """Of the checkpoint's config.json; of its text part, where it has several."""
        self.max_context = _max_context(settings, self.config)
        self.is_cpu = False

    def load(self) -> Any:
        """Returns when vLLM can generate. In a thread that lives as long as the engine."""
        _set_environment(self._settings)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        options: dict[str, Any] = {
            "model": str(self._folder),
            "served_model_name": [self._settings.model],
            "max_model_len": self.max_context,
            "max_num_seqs": self._settings.parallel_requests,
            "max_logprobs": MAX_LOGPROBS,
            "structured_outputs_config": {"backend": "guidance"},
            "disable_log_stats": True,
            **self._settings.parallelism.engine_arguments(),
        }
        self.is_cpu = current_platform.is_cpu()
        if self.is_cpu and is_known_version():
            _inspect_models_here()
            let_children_be_governed()
        if num_experts(self.config):
            options |= expert_options(self._settings.parallelism, is_cpu=self.is_cpu)
        options["additional_config"] = options.get("additional_config", {}) | closed_stores_option()
        chunk = _CPU_PROMPT_CHUNK if self.is_cpu else _GPU_PROMPT_CHUNK
        options["long_prefill_token_threshold"] = min(chunk, self.max_context)
        if self.is_cpu:
            options["kv_cache_memory_bytes"] = _cpu_cache_bytes(self._settings, self.config, self.max_context)
            # Compiling takes longer than loading the model.
            options["enforce_eager"] = True
        known = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - _OWNED_OPTIONS
        for name, value in self._settings.options.items():
            if name not in known:
                raise ValueError(f"engine_options: vLLM has no option {name!r} that can be set here")
            options[name] = value
        if not self.is_cpu:
            _set_gpu_environment(options)
        elif options["enforce_eager"]:
            # Parts of the sampler would compile at their first use.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))


class Starter:
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


def _inspect_models_here() -> None:
    """In this process, not in one more Python that imports all of vLLM: that is there lest a GPU be touched."""
    from vllm.model_executor.models import registry

    module: Any = registry
    module._run_in_subprocess = lambda inspect: inspect()


def _set_gpu_environment(options: Mapping[str, Any]) -> None:
    # As on CPUs. A fork takes the plugin for loaded, and its parts would be missing in the engine's process.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # Without a number vLLM loads with all cores and then computes with one thread: the threads of a number would wait
    # for each other by spinning in every step, and gain nothing on a GPU.
    os.environ.pop("OMP_NUM_THREADS", None)
    if options.get("dtype") in ("float32", "float"):
        # Triton's kernels, experts among them, would multiply with the 10 bits of mantissa that TF32 has.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def _max_context(settings: EngineSettings, config: Mapping[str, Any]) -> int:
    context = context_of(settings.model, settings.max_context, config.get("max_position_embeddings"))
    if context is None:
        raise ClusterError(f"The config.json of {settings.model} names no context length. Set max_context.")
    return context


def _cpu_cache_bytes(settings: EngineSettings, config: Mapping[str, Any], max_context: int) -> int:
    num_ranks = settings.parallelism.tensor_parallel_size
    facts = facts_of_config(config, num_ranks=num_ranks)
    if facts.bytes_per_token is None:
        raise ClusterError(
            f"The config.json of {settings.model} does not say how large its key-value cache is. Use another engine."
        )
    return vllm_cpu_cache_bytes(
        facts.bytes_per_token,
        facts.window,
        context=max_context,
        num_slots=settings.parallel_requests,
        dtype=settings.options.get("dtype"),
        step_tokens=settings.options.get("max_num_batched_tokens") or STEP_TOKENS,
        num_ranks=num_ranks,
    )
