"""The contract between windfarm and whatever turns token ids into vectors, and what is known of an embedding model.

An embedding engine is plain and blocking: token ids in, normalised float32 rows out. Prefixes, cutting and batching are
the caller's business. A dead engine raises `EngineDead` from `embed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cluster.errors import ModelDamaged

Vectors = npt.NDArray[np.float32]
"""Shape (num_texts, dimension), L2-normalised rows."""
Pooling = Literal["mean", "cls"]

DEFAULT_MAX_TOKENS = 512


class EmbeddingEngine(Protocol):
    """Runs one embedding model. Calls may come from any thread, one at a time."""

    @property
    def backend(self) -> str:
        """Name of library and precision, such as `llamacpp-q4_0`."""

    @property
    def dimension(self) -> int: ...

    def embed(self, token_ids: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of texts, each with its special tokens and within the model's limit, in the order given."""

    def close(self) -> None:
        """Free the model. Safe to call twice."""


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """How a model wants its texts: prefixes by kind (`query`, `passage`), pooling, longest input in tokens."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    pooling: Pooling = "mean"
    prefixes: Mapping[str, str] = field(default_factory=dict)


def read_embedding_spec(folder: Path) -> EmbeddingSpec:
    """Read the files that Sentence Transformers puts beside a checkpoint; what is missing takes the defaults."""
    prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    pooling = _read_json(folder / "1_Pooling" / "config.json")
    limits = [
        _read_json(folder / "sentence_bert_config.json").get("max_seq_length"),
        _read_json(folder / "tokenizer_config.json").get("model_max_length"),
        _read_json(folder / "config.json").get("max_position_embeddings"),
    ]
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1_000_000]
    prefixes = {str(kind): str(text) for kind, text in prompts.items()}
    if "document" in prefixes:
        prefixes.setdefault("passage", prefixes["document"])
    return EmbeddingSpec(
        max_tokens=min(known, default=DEFAULT_MAX_TOKENS),
        pooling="cls" if pooling.get("pooling_mode_cls_token") else "mean",
        prefixes=prefixes,
    )


def normalise(vectors: Vectors) -> Vectors:
    """Rows of length 1. Raises `ModelDamaged` where a row has no direction (NaN or all zero)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if vectors.size and not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ModelDamaged("The embedding model computes vectors without direction: prepare its files again.")
    return np.ascontiguousarray(vectors / lengths, dtype=np.float32) if vectors.size else vectors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelDamaged(f"{path} is not valid JSON ({error}): copy the checkpoint again.") from error
    return content if isinstance(content, dict) else {}
