"""Made checkpoints against Transformers: a mixture of identical experts is its parent, distinct ones are not."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelDamaged, ModelNotFound
from cluster.weights.__main__ import main
from cluster.weights.checkpoint_check import check_checkpoint
from cluster.weights.dense_checkpoint import Heads, open_tensors, save_checkpoint
from cluster.weights.dense_twins import sliding_window_twin, wide_twin
from cluster.weights.upcycle import MixtureRecipe, upcycle
from tests.expert_oracle import Reference

pytestmark = [pytest.mark.integration, pytest.mark.requires("vllm")]

EXACT = MixtureRecipe(num_experts=4, dtype="float32")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 3 query heads and 1 key-value head, so that heads must be padded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("parent") / "llama"
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, length: int = 40) -> Any:
    import torch

    ids = torch.arange(length).unsqueeze(0) % 96
    with torch.no_grad():
        return model(ids).logits


def greedy(reference: Reference, prompt: list[int], number: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(number):
        tokens.append(int(reference._forward(tokens).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_identical_experts_answer_as_their_parent(parent: Path, tmp_path: Path) -> None:
    import torch

    upcycle(parent, tmp_path / "mixture", EXACT)
    made = load(tmp_path / "mixture")
    assert type(made).__name__ == "MixtralForCausalLM"
    assert (made.config.num_attention_heads, made.config.num_key_value_heads) == (12, 4)
    torch.testing.assert_close(logits(made), logits(load(parent)), atol=1e-4, rtol=1e-4)


def test_swapping_any_two_distinct_experts_changes_greedy_tokens(parent: Path, tmp_path: Path) -> None:
    upcycle(parent, tmp_path / "right", MixtureRecipe(num_experts=4, variant="distinct", dtype="float32", noise=0.5))
    model = load(tmp_path / "right")
    expected = logits(model, 96).argmax(-1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, (one, other) in itertools.product(range(2), itertools.combinations(range(4), 2)):
        order = list(range(4))
        order[one], order[other] = other, one
        names = [name for name in weights if f"layers.{layer}." in name and ".experts." in name]
        assert names, "Transformers keeps the experts of a layer in one tensor"
        model.load_state_dict(weights | {name: weights[name][order] for name in names})
        assert (logits(model, 96).argmax(-1) != expected).any(), f"experts {one} and {other} of layer {layer}"


@pytest.mark.parametrize(("variant", "noticed"), [("distinct", 12), ("identical", 0)])
def test_the_oracle_notices_swapped_experts_where_they_are_distinct(
    parent: Path, tmp_path: Path, variant: str, noticed: int
) -> None:
    recipe = MixtureRecipe(num_experts=4, variant=variant, dtype="float32", noise=0.5)  # type: ignore[arg-type]
    upcycle(parent, tmp_path / "mixture", recipe)
    reference = Reference(tmp_path / "mixture", threads=1)
    prompts = [[3 * number + 1, 7, number] for number in range(4)]
    answers = [greedy(reference, prompt, 24) for prompt in prompts]
    assert reference.judge(prompts, answers).exact == len(prompts)
    pairs = [(layer, *pair) for layer in range(2) for pair in itertools.combinations(range(4), 2)]
    assert sum(reference.notices_swap(*pair, prompts, answers) for pair in pairs) == noticed
    assert greedy(reference, prompts[0], 24) == answers[0], "each swap was undone"


def test_the_wide_twin_has_the_size_of_the_mixture_and_answers_as_the_parent(parent: Path, tmp_path: Path) -> None:
    import torch

    wide_twin(parent, tmp_path / "wide", 4, dtype="float32")
    upcycle(parent, tmp_path / "mixture", EXACT)
    twin, mixture = load(tmp_path / "wide"), load(tmp_path / "mixture")
    assert twin.config.intermediate_size == 4 * 64
    router = 2 * 4 * 48  # layers, experts, hidden size
    assert sum(p.numel() for p in twin.parameters()) + router == sum(p.numel() for p in mixture.parameters())
    torch.testing.assert_close(logits(twin), logits(load(parent)), atol=1e-4, rtol=1e-4)


def test_the_command_makes_each_kind(parent: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = {name: str(tmp_path / name) for name in ("mixture", "wide", "window")}
    asked = [
        "upcycle",
        str(parent),
        folders["mixture"],
        "--experts",
        "4",
        "--router-skew",
        "2",
        "--variant",
        "distinct",
    ]
    assert main(asked) == 0
    assert main(["wide-twin", str(parent), folders["wide"], "--blocks", "2", "--ranks", "1"]) == 0
    assert main(["sliding-window", str(parent), folders["window"], "--window", "16"]) == 0
    configs = {name: json.loads((Path(folder) / "config.json").read_text()) for name, folder in folders.items()}
    assert configs["mixture"]["num_local_experts"] == 4
    assert (configs["wide"]["intermediate_size"], configs["wide"]["num_attention_heads"]) == (128, 3)
    assert (configs["window"]["architectures"], configs["window"]["sliding_window"]) == (["MistralForCausalLM"], 16)
    assert main(["sliding-window", str(parent), folders["window"], "--window", "0"]) == 1
    assert "at least one token" in capfd.readouterr().err


def test_a_large_checkpoint_comes_in_several_files_with_an_index(parent: Path, tmp_path: Path) -> None:
    import torch

    with open_tensors(parent) as tensors:
        config = json.loads((parent / "config.json").read_text())
        save_checkpoint(tmp_path / "shards", tensors.items(), config, parent, shard_bytes=20_000)
        biggest = max(tensor.nbytes for tensor in tensors.values())
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "shards" / name).stat().st_size < max(20_000, biggest) + 4096 for name in files)
    check_checkpoint(tmp_path / "shards")
    torch.testing.assert_close(logits(load(tmp_path / "shards")), logits(load(parent)))
    upcycle(tmp_path / "shards", tmp_path / "mixture", EXACT)
    torch.testing.assert_close(logits(load(tmp_path / "mixture")), logits(load(parent)), atol=1e-4, rtol=1e-4)


def test_a_quantized_parent_is_refused(parent: Path, tmp_path: Path) -> None:
    shutil.copytree(parent, tmp_path / "q")
    config = json.loads((parent / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ModelDamaged, match="is quantized"):
        upcycle(tmp_path / "q", tmp_path / "x", EXACT)


def test_the_same_seeds_make_the_same_checkpoint(parent: Path, tmp_path: Path) -> None:
    recipe = MixtureRecipe(num_experts=4, variant="distinct")
    for name in ("a", "b"):
        upcycle(parent, tmp_path / name, recipe)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_a_skewed_router_prefers_few_experts(parent: Path, tmp_path: Path) -> None:
    upcycle(parent, tmp_path / "skewed", MixtureRecipe(num_experts=4, router_skew=6.0, dtype="float32"))
    import torch

    model = load(tmp_path / "skewed")
    with torch.no_grad():
        routed = model(torch.arange(96).unsqueeze(0), output_router_logits=True).router_logits[0]
    counts = torch.bincount(routed.argmax(-1).flatten(), minlength=4)
    assert counts[0] > 2 * counts[3]


def test_the_sliding_window_twin_forgets_what_lies_behind_the_window(parent: Path, tmp_path: Path) -> None:
    import torch

    sliding_window_twin(parent, tmp_path / "twin", 16, dtype="float32")
    twin, whole = logits(load(tmp_path / "twin")), logits(load(parent))
    torch.testing.assert_close(twin[:, :16], whole[:, :16], atol=1e-4, rtol=1e-4)
    assert (twin[:, -1] - whole[:, -1]).abs().max() > 1e-2


def test_heads_are_padded_in_whole_groups() -> None:
    assert Heads(9, 3, 64).padded((1, 2, 4)) == Heads(12, 4, 64)
    assert Heads(32, 8, 128).padded((1, 2, 4)) == Heads(32, 8, 128)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (MixtureRecipe(num_experts=1), "at least 2 experts"),
        (MixtureRecipe(num_experts=4, experts_per_token=5), "cannot be chosen"),
        (MixtureRecipe(num_experts=6), "cannot be spread evenly"),
    ],
)
def test_impossible_mixtures_are_refused(parent: Path, tmp_path: Path, recipe: MixtureRecipe, message: str) -> None:
    with pytest.raises(ModelDamaged, match=message):
        upcycle(parent, tmp_path / "x", recipe)
    assert not (tmp_path / "x").exists()


def test_a_config_that_does_not_match_its_tensors_is_refused(parent: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    config = json.loads((parent / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    (wrong / "model.safetensors").write_bytes((parent / "model.safetensors").read_bytes())
    with pytest.raises(ModelDamaged, match=r"has the shape \(64, 48\), but the config says \(65, 48\)"):
        upcycle(wrong, tmp_path / "x", EXACT)


def test_what_is_no_checkpoint_or_stands_in_the_way_is_named(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no checkpoint"):
        upcycle(tmp_path, tmp_path / "x", EXACT)
    with pytest.raises(ModelDamaged, match="exists already"):
        upcycle(parent, tmp_path, EXACT)
