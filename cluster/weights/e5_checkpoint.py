"""Writes the E5 sentence encoder as a standard `BertModel` checkpoint: config.json, safetensors, tokenizer files.

Needs numpy only. Values are stored in float16: the file's own scales are float16 and its steps have 4 bits, so that
the rounding (1 in 2000) is far below the 4-bit steps themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from cluster.weights.e5_tokenizer import write_e5_tokenizer
from cluster.weights.e5s1 import E5File, FloatArray

_BERT_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
"""Part of a layer in the E5S1 file -> its name in `BertModel`."""


def part_shape(source: E5File, part: str) -> tuple[int, int]:
    """Rows and columns of a part's weight; LayerNorms have one column."""
    hidden, wide = source.shape.hidden, source.shape.feed_forward
    return {"fi": (wide, hidden), "fo": (hidden, wide), "aln": (hidden, 1), "oln": (hidden, 1)}.get(
        part, (hidden, hidden)
    )


def write_e5_checkpoint(source: E5File, folder: Path) -> None:
    """Write the whole checkpoint into an empty folder."""
    tensors = {name: np.ascontiguousarray(values, dtype=np.float16) for name, values in _bert_tensors(source)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_bert_config(source), indent=2) + "\n", encoding="utf-8")
    write_e5_tokenizer(source.vocabulary, folder, source.shape.max_positions)


def _bert_tensors(source: E5File) -> Iterator[tuple[str, FloatArray]]:
    shape = source.shape
    yield "embeddings.word_embeddings.weight", source.matrix("emb.word", shape.vocabulary, shape.hidden)
    yield "embeddings.position_embeddings.weight", source.matrix("emb.pos", shape.max_positions, shape.hidden)
    yield "embeddings.token_type_embeddings.weight", source.matrix("emb.type", shape.num_types, shape.hidden)
    yield "embeddings.LayerNorm.weight", source.vector("emb.ln.w", shape.hidden)
    yield "embeddings.LayerNorm.bias", source.vector("emb.ln.b", shape.hidden)
    for layer in range(shape.num_layers):
        for part, bert_part in _BERT_PARTS.items():
            rows, columns = part_shape(source, part)
            name = f"encoder.layer.{layer}.{bert_part}"
            weight = source.matrix(f"l{layer}.{part}.w", rows, columns)
            yield f"{name}.weight", weight[:, 0] if columns == 1 else weight
            yield f"{name}.bias", source.vector(f"l{layer}.{part}.b", rows)


def _bert_config(source: E5File) -> dict[str, object]:
    shape = source.shape
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": "float16",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.feed_forward,
        "hidden_act": "gelu",
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.max_positions,
        "position_embedding_type": "absolute",
        "type_vocab_size": shape.num_types,
        "layer_norm_eps": float(f"{shape.norm_epsilon:.6g}"),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": source.vocabulary.pad,
        "bos_token_id": source.vocabulary.bos,
        "eos_token_id": source.vocabulary.eos,
    }
