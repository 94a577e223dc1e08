"""The bundled mixture as it is made on this machine: whole, of the parent's weights, fit for two and four ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.catalogue import CATALOGUE, SMALL
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


def test_it_is_made_only_when_it_is_asked_for_and_only_as_a_checkpoint() -> None:
    assert "small" in CATALOGUE
    assert not any("small" in target for target in DEFAULT_TARGETS)
    with pytest.raises(ModelNotFound, match="cannot be had as gguf, only as hf"):
        prepare("small", "gguf", open_home())
