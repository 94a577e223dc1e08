"""Shapes of models that can be planned for without having them: the published numbers of the Mistral family.

Sources: the `config.json` files that Mistral AI published with Mistral 7B v0.1 and Mixtral 8x7B v0.1, and Meta's with
Llama 2 70B (the architecture of miqu-1-70b, which went round as GGUF Q4_K_M of 41.4 GB, Q5_K_M of 48.8 GB).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import ModelDamaged, ModelNotFound
from cluster.sizing import ModelShape, shape_from_config
from cluster.weights.checkpoint_check import check_checkpoint
from cluster.weights.safetensors_header import fingerprint

KNOWN_SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 30, 576, 1536, 9, 3, 64, 49152, 8192, tied_embeddings=True),
        # The same with heads padded to 12 and 4, so that two and four ranks divide them.
        ModelShape(
            "small", 30, 576, 1536, 12, 4, 64, 49152, 8192, num_experts=8, experts_per_token=2, tied_embeddings=True
        ),
        ModelShape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32000, 32768, sliding_window=4096),
        ModelShape("mixtral-8x7b", 32, 4096, 14336, 32, 8, 128, 32000, 32768, num_experts=8, experts_per_token=2),
        ModelShape("llama-2-70b", 80, 8192, 28672, 64, 8, 128, 32000, 4096),
        ModelShape("miqu-1-70b-q4", 80, 8192, 28672, 64, 8, 128, 32000, 32764, bytes_per_param=41.4e9 / 68.98e9),
        ModelShape("miqu-1-70b-q5", 80, 8192, 28672, 64, 8, 128, 32000, 32764, bytes_per_param=48.8e9 / 68.98e9),
    )
}


def checkpoint_of(source: str, home: Path) -> str:
    """Fingerprint of the files of a model that can be planned for; empty where they are not on this machine."""
    prepared = home / "models" / source / "hf"
    folder = prepared if source in KNOWN_SHAPES else Path(source)
    return fingerprint(folder) if folder.is_dir() else ""


def find_shape(source: str) -> ModelShape:
    """Shape of a known model or of a checkpoint folder; raises `ModelNotFound` with the nearest name."""
    if source in KNOWN_SHAPES:
        return KNOWN_SHAPES[source]
    config = Path(source) / "config.json"
    if config.is_file():
        try:
            shape = shape_from_config(json.loads(config.read_text(encoding="utf-8")), name=Path(source).resolve().name)
        except ValueError as error:
            raise ModelDamaged(f"{config} is not JSON: {error}. Copy the checkpoint again.") from error
        check_checkpoint(config.parent)
        return shape
    near = difflib.get_close_matches(source, KNOWN_SHAPES, n=1, cutoff=0.3)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ModelNotFound(
        f"No model {source!r} can be planned for. {hint}Name one of {', '.join(KNOWN_SHAPES)}, or a folder that holds "
        "a config.json."
    )
