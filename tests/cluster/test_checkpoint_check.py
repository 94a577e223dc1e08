"""A checkpoint whose config does not match its tensors, or whose files are cut, is refused from the headers alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from cluster.catalogue import resolve
from cluster.errors import ModelDamaged
from cluster.home import open_home
from cluster.known_shapes import find_shape
from cluster.weights.checkpoint_check import check_checkpoint
from cluster.weights.prepare import prepare
from cluster.weights.safetensors_header import fingerprint, read_tensor_infos
from services.config import AppConfig, ModelConfig
from services.preflight import check_models
from services.ray_config import RayConfig

MIXTURE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
}
DENSE = {key: value for key, value in MIXTURE.items() if "expert" not in key} | {"architectures": ["LlamaForCausalLM"]}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What a sound checkpoint of `config` holds, written out by hand."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,)}
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        shapes |= {stem + "self_attn.q_proj.weight": (8, 8), stem + "self_attn.k_proj.weight": (4, 8)}
        shapes |= {stem + "self_attn.v_proj.weight": (4, 8), stem + "self_attn.o_proj.weight": (8, 8)}
        shapes |= {stem + "input_layernorm.weight": (8,), stem + "post_attention_layernorm.weight": (8,)}
        if "num_local_experts" not in config:
            shapes |= {stem + "mlp.gate_proj.weight": (6, 8), stem + "mlp.up_proj.weight": (6, 8)}
            shapes |= {stem + "mlp.down_proj.weight": (8, 6)}
            continue
        shapes[stem + "block_sparse_moe.gate.weight"] = (2, 8)
        for expert in range(2):
            for name, shape in {"w1": (6, 8), "w2": (8, 6), "w3": (6, 8)}.items():
                shapes[f"{stem}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes


def write(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], fill: int = 1) -> Path:
    folder.mkdir()
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + 2 * prod(shape)]}
        offset += 2 * prod(shape)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes([fill]) * offset)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [MIXTURE, DENSE], ids=["mixture", "dense"])
def test_a_sound_checkpoint_passes(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "sound", config, shapes_of(config))
    check_checkpoint(folder)
    assert prepare(str(folder), "hf", open_home(tmp_path / "home")) == folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 7}, r"w1.weight has the shape \(6, 8\), but the config says \(7, 8\)"),
        ({"vocab_size": 11}, r"embed_tokens.weight has the shape \(10, 8\), but the config says \(11, 8\)"),
        ({"num_key_value_heads": 1}, r"k_proj.weight has the shape \(4, 8\), but the config says \(2, 8\)"),
        ({"num_hidden_layers": 3}, "promises model.layers.2.self_attn.q_proj.weight, but the weights lack it"),
        ({"num_hidden_layers": 1}, "says 1 layers, but the weights hold 2"),
        ({"tie_word_embeddings": False}, "promises lm_head.weight, but the weights lack it"),
        ({"num_local_experts": 4}, r"gate.weight has the shape \(2, 8\), but the config says \(4, 8\)"),
    ],
)
def test_a_config_of_another_model_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "wrong", MIXTURE | change, shapes_of(MIXTURE))
    for look in (
        lambda: check_checkpoint(folder),
        lambda: find_shape(str(folder)),
        lambda: prepare(str(folder), "hf", open_home(tmp_path / "home")),
    ):
        with pytest.raises(ModelDamaged, match=message):
            look()


def test_more_experts_than_the_config_says_are_refused(tmp_path: Path) -> None:
    shapes = shapes_of(MIXTURE) | {"model.layers.1.block_sparse_moe.experts.2.w1.weight": (6, 8)}
    with pytest.raises(ModelDamaged, match="says 2 experts in layer 1, but the weights hold 3"):
        check_checkpoint(write(tmp_path / "wrong", MIXTURE, shapes))


def test_it_is_told_before_anything_starts(tmp_path: Path) -> None:
    folder = write(tmp_path / "wrong", DENSE | {"vocab_size": 11}, shapes_of(DENSE))

    app = AppConfig(models={"m": ModelConfig(id="m", source=str(folder))})
    finding, _ = check_models(RayConfig(tmp_path / "ray_config.yaml", app, (), {}), tmp_path)
    assert not finding.is_ok
    assert "the config says (11, 8)" in finding.text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def broken_json(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"x" + content[9:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "has .* bytes, but its header says"),
        (no_header, "is no safetensors file or was cut"),
        (broken_json, "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", DENSE, shapes_of(DENSE))
    damage(folder / "model.safetensors")
    with pytest.raises(ModelDamaged, match=message) as caught:
        check_checkpoint(folder)
    assert "model.safetensors" in str(caught.value)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", DENSE, shapes_of(DENSE))
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelDamaged, match=r"lacks model-00002-of-00002\.safetensors, which its index names"):
        read_tensor_infos(folder)


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first, copy = (write(tmp_path / name, DENSE, shapes_of(DENSE)) for name in ("a", "b"))
    other = write(tmp_path / "c", DENSE, shapes_of(DENSE), fill=2)
    assert fingerprint(first) == fingerprint(copy) != fingerprint(other)


def test_the_bundled_mixture_is_known_to_the_catalogue_and_the_planner() -> None:
    entry = resolve("small").entry
    assert entry is not None and entry.formats == ("hf",)
    shape = find_shape("small")
    assert shape.total_params == entry.num_parameters
    assert (shape.num_experts, shape.experts_per_token) == (8, 2)
    assert all(heads % ranks == 0 for heads in (shape.num_heads, shape.num_kv_heads) for ranks in (2, 4))
