"""Checks a converted E5 encoder against known vectors, so that a wrong conversion is never served.

The known vectors come from an independent implementation (see `known_vectors.json`). A checkpoint is computed here with
numpy, which needs no torch and shares no code with the engines.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from cluster.engines.embedding import Vectors, normalise
from cluster.errors import ModelDamaged

MIN_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class KnownVectors:
    """Texts with their prefixes, and their vectors."""

    texts: tuple[str, ...]
    vectors: Vectors


@cache
def read_known_vectors() -> KnownVectors:
    content = json.loads(Path(__file__).with_name("known_vectors.json").read_text(encoding="utf-8"))
    vectors = np.asarray([item["vector"] for item in content["items"]], dtype=np.float32)
    return KnownVectors(tuple(item["text"] for item in content["items"]), normalise(vectors))


def check_vectors(computed: Vectors, what: str) -> float:
    """Smallest cosine to the known vectors. Raises `ModelDamaged` when it is too small."""
    known = read_known_vectors().vectors
    cosine = float((known * computed).sum(axis=1).min()) if computed.shape == known.shape else math.nan
    if not cosine >= MIN_COSINE:
        raise ModelDamaged(
            f"{what} computes other vectors than it should (cosine {cosine:.4f}): install its package again."
        )
    return cosine


def check_e5_checkpoint(folder: Path) -> float:
    """Compute the known texts with the checkpoint in `folder`."""
    return check_vectors(embed_with_numpy(folder, read_known_vectors().texts), f"The checkpoint in {folder}")


def check_e5_gguf(path: Path) -> float:
    """Compute the known texts with llama.cpp."""
    from cluster.engines.embedding_llamacpp import LlamaCppEmbedding

    tokenizer = Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    engine = LlamaCppEmbedding(path, threads=1, max_tokens=512)
    try:
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(read_known_vectors().texts))]
        return check_vectors(engine.embed(ids), f"The file {path}")
    finally:
        engine.close()


def embed_with_numpy(folder: Path, texts: tuple[str, ...]) -> Vectors:
    """The slow, plain way: one text after the other through a BERT encoder in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder = _NumpyBert(config, weights)
    return normalise(np.stack([encoder.mean_state(tokenizer.encode(text).ids) for text in texts]))


class _NumpyBert:
    def __init__(self, config: dict[str, int | float], weights: dict[str, Vectors]) -> None:
        words = "embeddings.word_embeddings.weight"  # most of the model, of which few rows are needed
        self._weights = {name: value if name == words else value.astype(np.float32) for name, value in weights.items()}
        self._num_layers = int(config["num_hidden_layers"])
        self._num_heads = int(config["num_attention_heads"])
        self._epsilon = float(config["layer_norm_eps"])

    def mean_state(self, ids: list[int]) -> Vectors:
        w = self._weights
        state = (
            w["embeddings.word_embeddings.weight"][ids].astype(np.float32)
            + w["embeddings.position_embeddings.weight"][: len(ids)]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        state = self._norm("embeddings.LayerNorm", state)
        for layer in range(self._num_layers):
            state = self._layer(f"encoder.layer.{layer}", state)
        mean: Vectors = state.mean(axis=0)
        return mean

    def _layer(self, name: str, state: Vectors) -> Vectors:
        attended = self._linear(f"{name}.attention.output.dense", self._attend(name, state))
        state = self._norm(f"{name}.attention.output.LayerNorm", state + attended)
        wide = _gelu(self._linear(f"{name}.intermediate.dense", state))
        return self._norm(f"{name}.output.LayerNorm", state + self._linear(f"{name}.output.dense", wide))

    def _attend(self, name: str, state: Vectors) -> Vectors:
        length, hidden = state.shape
        query, key, value = (
            self._linear(f"{name}.attention.self.{part}", state).reshape(length, self._num_heads, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / math.sqrt(hidden // self._num_heads)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        joined: Vectors = (weights @ value).swapaxes(0, 1).reshape(length, hidden)
        return joined

    def _linear(self, name: str, state: Vectors) -> Vectors:
        result: Vectors = state @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return result

    def _norm(self, name: str, state: Vectors) -> Vectors:
        centred = state - state.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self._epsilon)
        result: Vectors = scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return result


def _gelu(x: Vectors) -> Vectors:
    # The error function by Abramowitz and Stegun 7.1.26 (error below 1.5e-7): numpy has none.
    z = np.abs(x) / np.sqrt(np.float32(2))
    t = 1 / (1 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - poly * np.exp(-z * z))
    result: Vectors = (0.5 * x * (1 + erf)).astype(np.float32)
    return result
