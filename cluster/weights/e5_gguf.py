"""Writes the E5 sentence encoder as one GGUF file for llama.cpp (architecture `bert`, mean pooling).

The 4-bit blocks of the source are copied as they are (GGUF calls them Q4_0) or widened to 8 bits (Q8_0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from cluster.weights.e5_checkpoint import part_shape
from cluster.weights.e5_tokenizer import SPECIAL_TOKENS
from cluster.weights.e5s1 import E5File

MatrixType = Literal["q8_0", "q4_0"]

_GGUF_PARTS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "ao": "attn_output",
    "aln": "attn_output_norm",
    "fi": "ffn_up",
    "fo": "ffn_down",
    "oln": "layer_output_norm",
}
"""Part of a layer in the E5S1 file -> its name in GGUF."""


def write_e5_gguf(source: E5File, path: Path, matrix_type: MatrixType) -> None:
    """Write the whole model with its tokenizer into one file."""
    writer = gguf.GGUFWriter(path, "bert")
    _add_settings(writer, source)
    _add_vocabulary(writer, source)
    _add_tensors(writer, source, matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer: gguf.GGUFWriter, source: E5File) -> None:
    shape = source.shape
    writer.add_name("multilingual-e5-small")
    writer.add_license("mit")
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_block_count(shape.num_layers)
    writer.add_head_count(shape.num_heads)
    writer.add_layer_norm_eps(shape.norm_epsilon)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)


def _add_vocabulary(writer: gguf.GGUFWriter, source: E5File) -> None:
    vocabulary = source.vocabulary
    # The embedding matrix has more rows than the vocabulary has pieces; every row needs a name.
    num_spare = source.shape.vocabulary - len(vocabulary.pieces)
    pieces = vocabulary.pieces + [f"[unused{i}]" for i in range(num_spare)]
    kinds = [gguf.TokenType.CONTROL if p in SPECIAL_TOKENS else gguf.TokenType.NORMAL for p in vocabulary.pieces]
    kinds[vocabulary.unk] = gguf.TokenType.UNKNOWN
    kinds += [gguf.TokenType.UNUSED] * num_spare
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(vocabulary.scores + [min(vocabulary.scores)] * num_spare)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_token_type_count(1)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_unk_token_id(vocabulary.unk)
    writer.add_sep_token_id(vocabulary.eos)
    writer.add_pad_token_id(vocabulary.pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def _add_tensors(writer: gguf.GGUFWriter, source: E5File, matrix_type: MatrixType) -> None:
    shape = source.shape
    _add_matrix(writer, source, "emb.word", "token_embd.weight", (shape.vocabulary, shape.hidden), matrix_type)
    writer.add_tensor("position_embd.weight", source.matrix("emb.pos", shape.max_positions, shape.hidden))
    # Only the first type is ever used.
    writer.add_tensor("token_types.weight", source.matrix("emb.type", shape.num_types, shape.hidden)[:1].copy())
    writer.add_tensor("token_embd_norm.weight", source.vector("emb.ln.w", shape.hidden))
    writer.add_tensor("token_embd_norm.bias", source.vector("emb.ln.b", shape.hidden))
    for layer in range(shape.num_layers):
        for part, gguf_part in _GGUF_PARTS.items():
            rows, columns = part_shape(source, part)
            name = f"blk.{layer}.{gguf_part}"
            if columns == 1:
                writer.add_tensor(f"{name}.weight", source.vector(f"l{layer}.{part}.w", rows))
            else:
                _add_matrix(writer, source, f"l{layer}.{part}.w", f"{name}.weight", (rows, columns), matrix_type)
            writer.add_tensor(f"{name}.bias", source.vector(f"l{layer}.{part}.b", rows))


def _add_matrix(
    writer: gguf.GGUFWriter, source: E5File, name: str, target: str, shape: tuple[int, int], matrix_type: MatrixType
) -> None:
    kind = gguf.GGMLQuantizationType[matrix_type.upper()]
    if matrix_type == "q4_0":
        packed = source.tensors[name].blocks().reshape(shape[0], -1)
    else:
        packed = gguf.quants.quantize(np.ascontiguousarray(source.matrix(name, *shape)), kind)
    writer.add_tensor(target, packed, raw_dtype=kind)
