"""A real, tiny Mixtral checkpoint, and the configuration of the repository with models of it beside the others."""

from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "ray_config.yaml"
CHECKPOINT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def save_mixture(folder: Path) -> str:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**CHECKPOINT)).save_pretrained(folder)
    return str(folder)


def with_model(arguments: str, deployments: str = "", name: str = "mixture") -> str:
    return FILE.read_text(encoding="utf-8").replace(
        "  - name: llm-tiny", f"{line_of(name, arguments, deployments)}  - name: llm-tiny", 1
    )


def line_of(name: str, arguments: str, deployments: str = "") -> str:
    return (
        f"  - {{name: llm-{name}, route_prefix: null, import_path: 'services.app:build_model', "
        f"args: {{id: {name}, {arguments}}}{deployments}}}\n"
    )
