"""Token positions from a Hugging Face `tokenizer.json`, for cutting text at token borders. Loads no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from rag.chunking import TokenSpans


def load_token_spans(tokenizer_file: Path) -> TokenSpans:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def token_spans(text: str) -> Sequence[tuple[int, int]]:
        return tokenizer.encode(text, add_special_tokens=False).offsets

    return token_spans
