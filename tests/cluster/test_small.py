"""The bundled mixture as it is made on this machine: whole, of the parent's weights, fit for two and four ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.catalogue import CATALOGUE, SMALL
from cluster.engine import GenerationRequest, SamplingParams
from cluster.engines.choice import EngineChoice, make_engine
from cluster.engines.settings import EngineSettings
from cluster.errors import ModelNotFound
from cluster.home import open_home
from cluster.known_shapes import KNOWN_SHAPES, find_shape
from cluster.weights.__main__ import DEFAULT_TARGETS
from cluster.weights.manifest import read_manifest
from cluster.weights.prepare import prepare

pytestmark = [pytest.mark.integration, pytest.mark.requires("vllm")]


@pytest.fixture(scope="module")
def small() -> Path:
    """In the data folder of this machine: made once, later only verified."""
    return prepare("small", "hf", open_home())


def test_it_is_sealed_and_has_the_shape_that_is_planned_with(small: Path) -> None:
    manifest = read_manifest(small)
    assert manifest is not None
    assert set(manifest.files) == {path.name for path in small.iterdir()} - {"manifest.json"}
    assert manifest.source_sha256 == SMALL.file.sha256
    assert json.loads((small / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    planned = KNOWN_SHAPES["small"]
    found = find_shape(str(small))
    assert [getattr(found, name) for name in planned.__slots__ if name != "name"] == [
        getattr(planned, name) for name in planned.__slots__ if name != "name"
    ]


def test_every_expert_is_the_parents_block_and_routers_differ(small: Path) -> None:
    import torch
    from safetensors import safe_open

    parent = prepare("tiny", "hf", open_home())
    with (
        safe_open(parent / "model.safetensors", "pt") as dense,
        safe_open(small / "model.safetensors", "pt") as sparse,
    ):
        for layer in (0, 29):
            stem = f"model.layers.{layer}."
            for ours, theirs in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
                block = dense.get_tensor(f"{stem}mlp.{theirs}.weight")
                for expert in (0, 7):
                    made = sparse.get_tensor(f"{stem}block_sparse_moe.experts.{expert}.{ours}.weight")
                    assert torch.equal(made, block)
            queries = sparse.get_tensor(f"{stem}self_attn.q_proj.weight")
            assert torch.equal(queries[: 9 * 64], dense.get_tensor(f"{stem}self_attn.q_proj.weight"))
            assert not queries[9 * 64 :].any(), "padded heads are zero"
        gates = [sparse.get_tensor(f"model.layers.{layer}.block_sparse_moe.gate.weight") for layer in (0, 1)]
    assert not torch.equal(*gates)


def likeliest_token(folder: Path, prompt: list[int]) -> int:
    """What Transformers says comes next, in the checkpoint's own type."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        return int(model(torch.tensor([prompt])).logits[0, -1].argmax())


@pytest.fixture(scope="module")
def answer(small: Path) -> tuple[list[int], int]:
    """A prompt, and the token that Transformers' mixture answers with."""
    from transformers import AutoTokenizer

    prompt = list(AutoTokenizer.from_pretrained(small)("The capital of France is").input_ids)
    return prompt, likeliest_token(small, prompt)


def test_transformers_loads_it_and_it_answers_as_its_parent(answer: tuple[list[int], int]) -> None:
    prompt, token = answer
    assert token == likeliest_token(prepare("tiny", "hf", open_home()), prompt)


def test_vllm_reads_it_as_a_mixture(small: Path) -> None:
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(small)).create_model_config()
    assert config.architecture == "MixtralForCausalLM"
    assert config.get_num_experts() == 8
    assert [config.get_num_attention_heads(ParallelConfig(tensor_parallel_size=tensor)) for tensor in (1, 2, 4)] == [
        12,
        6,
        3,
    ]


@pytest.mark.ranks
async def test_vllm_loads_it_and_answers_with_the_same_token(small: Path, answer: tuple[list[int], int]) -> None:
    prompt, token = answer
    settings = EngineSettings("small", small, max_context=128, parallel_requests=1, max_queued_requests=1)
    engine = make_engine(EngineChoice("vllm", "hf", uses_gpu=False), settings)
    await engine.start()
    try:
        request = GenerationRequest("r", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1, temperature=0))
        chunks = [chunk async for chunk in engine.generate(request)]
    finally:
        await engine.stop()
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == [token]


def test_it_is_made_only_when_it_is_asked_for_and_only_as_a_checkpoint() -> None:
    assert "small" in CATALOGUE
    assert not any("small" in target for target in DEFAULT_TARGETS)
    with pytest.raises(ModelNotFound, match="cannot be had as gguf, only as hf"):
        prepare("small", "gguf", open_home())
