"""On GPUs the engine asks vLLM for the experts of each answer and counts them: all of our code, with vLLM's engine
scripted, so that no GPU is needed."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.engine import GenerationRequest, SamplingParams
from cluster.engines.expert_balancer import balancer_options
from cluster.engines.parallelism import Parallelism
from cluster.engines.settings import EngineSettings
from cluster.engines.vllm import VllmEngine
from cluster.errors import LoadUnavailable
from cluster.expert_load import ExpertLoad

pytestmark = pytest.mark.requires("vllm")

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
ROUTED = np.array([[[0, 1], [2, 3]], [[0, 3], [2, 3]], [[0, 1], [1, 3]]], np.int16)
"""[tokens, layers, experts per token] of one answer."""


class ScriptedVllm:
    """What our engine uses of `AsyncLLM`: each answer is two tokens, the last of which brings the answer's experts."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.errored = False
        self.num_cached = 0
        self.model_config = SimpleNamespace(
            enable_return_routed_experts=arguments.enable_return_routed_experts,
            get_diff_sampling_param=dict,
            try_get_generation_config=dict,
        )

        cache = SimpleNamespace(num_gpu_blocks=8, block_size=16)
        self.vllm_config = SimpleNamespace(cache_config=cache)

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(eos_token_id=0)

    async def is_sleeping(self) -> bool:
        return False

    def shutdown(self, timeout: float) -> None:
        self.errored = True

    async def generate(self, prompt: Any, params: Any, *, request_id: str) -> AsyncIterator[Any]:
        for token, reason in ((7, None), (8, "length")):
            completion = SimpleNamespace(
                token_ids=[token],
                text="x",
                finish_reason=reason,
                logprobs=None,
                routed_experts=ROUTED if reason and self.arguments.enable_return_routed_experts else None,
            )
            yield SimpleNamespace(outputs=[completion], num_cached_tokens=self.num_cached)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedVllm]:
    """The engines that are made; the platform says that it is no CPU."""
    from vllm.v1.engine.async_llm import AsyncLLM

    made: list[ScriptedVllm] = []

    def make(arguments: Any) -> ScriptedVllm:
        made.append(ScriptedVllm(arguments))
        return made[-1]

    monkeypatch.setattr(AsyncLLM, "from_engine_args", make)
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr("cluster.engines.vllm_start._set_environment", lambda settings: None)
    for name in ("OMP_NUM_THREADS", "TRITON_F32_DEFAULT", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(name, "")  # what the start sets is undone
    return made


def engine_of(folder: Path, **changes: Any) -> VllmEngine:
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    values: dict[str, Any] = {"max_context": 64, "parallel_requests": 2, "max_queued_requests": 2, "options": {}}
    values["parallelism"] = Parallelism(2, enable_expert_parallel=True, count_experts=True)
    return VllmEngine(EngineSettings("m", folder, **(values | changes)))


async def answer(engine: VllmEngine) -> None:
    request = GenerationRequest("r", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=2))
    assert [chunk async for chunk in engine.generate(request)][-1].finish_reason == "length"


async def load_after(engine: VllmEngine, num_answers: int, *, num_cached: int = 0) -> ExpertLoad:
    await engine.start()
    try:
        engine._engine.num_cached = num_cached
        for _ in range(num_answers):
            await answer(engine)
        load = await engine.expert_load()
    finally:
        await engine.stop()
    assert load is not None
    return load


async def test_experts_that_vllm_reports_with_answers_are_counted(tmp_path: Path, gpu: list[ScriptedVllm]) -> None:
    load = await load_after(engine_of(tmp_path), 2)
    assert load.tokens.tolist() == [[6, 4, 0, 2], [0, 2, 4, 6]]
    assert load.rank_tokens().tolist() == [[10, 2], [2, 10]]
    (made,) = gpu
    assert made.arguments.enable_return_routed_experts is True
    assert (made.arguments.enable_expert_parallel, made.arguments.enable_eplb) == (True, False)


@pytest.mark.usefixtures("gpu")
async def test_what_vllm_had_in_its_cache_is_not_counted_again(tmp_path: Path) -> None:
    load = await load_after(engine_of(tmp_path), 1, num_cached=2)
    assert load.tokens.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee"), ("auto", None)])
async def test_on_a_gpu_processes_load_the_plugin_vllm_chooses_its_threads_and_float32_is_exact(
    dtype: str, precision: str | None, tmp_path: Path, gpu: list[ScriptedVllm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.delenv("TRITON_F32_DEFAULT")
    engine = engine_of(tmp_path, options={"dtype": dtype})
    await engine.start()
    await engine.stop()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn", "a fork takes the plugin for loaded"
    assert "OMP_NUM_THREADS" not in os.environ
    assert os.environ.get("TRITON_F32_DEFAULT") == precision


async def test_with_vllms_balancer_experts_are_counted_and_ranks_are_not(
    tmp_path: Path, gpu: list[ScriptedVllm]
) -> None:
    load = await load_after(engine_of(tmp_path, options=balancer_options(2)), 1)
    assert load.tokens.tolist() == [[3, 2, 0, 1], [0, 1, 2, 3]]
    assert (load.is_balanced, load.rank_tokens().shape) == (True, (2, 0))
    (made,) = gpu
    assert (made.arguments.enable_eplb, made.arguments.eplb_config.num_redundant_experts) == (True, 2)


async def test_turned_off_by_the_operator_there_are_no_counts_and_the_reason_is_said(
    tmp_path: Path, gpu: list[ScriptedVllm]
) -> None:
    engine = engine_of(tmp_path, options={"enable_return_routed_experts": False})
    await engine.start()
    try:
        await answer(engine)
        with pytest.raises(LoadUnavailable, match="turn enable_return_routed_experts off"):
            await engine.expert_load()
    finally:
        await engine.stop()
