"""Builds the tokenizer of the E5 models from their Unigram vocabulary, as a standard tokenizer.json.

Rules are those of XLM-RoBERTa: NFKC with a few exceptions, blanks collapsed, word starts marked, `<s> text </s>`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cluster.weights.e5s1 import E5Vocabulary

# What XLM-RoBERTa's own table does beyond NFKC: control characters vanish, invisible spaces become blanks.
_VANISH = "[\u0001-\u0008\u000b\u000e-\u001f\u007f\u008f\u009f]"
_BLANKS = "[\t\n\u000c\r\u1680\u200b-\u200f\u2028\u2029\u2581\ufeff\ufffd]"
# It keeps the wide tilde of Chinese and Japanese text, which NFKC would replace: park it on a private character.
_TILDE, _PARKED = "\uff5e", "\U0010fffd"

PREFIXES = {"query": "query: ", "passage": "passage: "}
"""What the model was trained with: without them questions and answers lie in the wrong place."""

_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def build_e5_tokenizer(vocabulary: E5Vocabulary) -> Tokenizer:
    """A tokenizer whose ids are the vocabulary's indices and which adds `<s>` and `</s>`."""
    pieces = list(zip(vocabulary.pieces, vocabulary.scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=vocabulary.unk, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(_VANISH), ""),
            normalizers.Replace(Regex(_BLANKS), " "),
            normalizers.Replace(_TILDE, _PARKED),
            normalizers.NFKC(),
            normalizers.Replace(_PARKED, _TILDE),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    bos, eos = vocabulary.pieces[vocabulary.bos], vocabulary.pieces[vocabulary.eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, vocabulary.bos), (eos, vocabulary.eos)],
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_e5_tokenizer(vocabulary: E5Vocabulary, folder: Path, max_tokens: int) -> None:
    """tokenizer.json and tokenizer_config.json, as Transformers reads them; prefixes and pooling, as
    Sentence Transformers reads them."""
    build_e5_tokenizer(vocabulary).save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "config_sentence_transformers.json", {"prompts": PREFIXES, "similarity_fn_name": "cosine"})
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    _write_json(folder / "modules.json", _MODULES)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
