"""Text to token ids for embedding models: prefix, special tokens, and the cut at the model's limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from cluster.engines.embedding import EmbeddingSpec
from cluster.errors import InvalidRequest, ModelDamaged

_MAX_CHARACTERS_PER_TOKEN = 64
"""Longer text than this times the token limit is cut before tokenizing: it would only cost time."""


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """Token ids ready for the engine. `is_truncated`: the text was longer than the model can take."""

    token_ids: list[int]
    is_truncated: bool


class EmbeddingTokenizer:
    """The tokenizer of one embedding model. May be used from several threads."""

    def __init__(self, folder: Path, spec: EmbeddingSpec) -> None:
        self.file = path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelDamaged(f"{path} is missing: an embedding model needs its tokenizer.json beside its weights.")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelDamaged(f"{path} cannot be read ({error}): copy the model again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.max_tokens)
        self._max_tokens = spec.max_tokens
        self._max_characters = spec.max_tokens * _MAX_CHARACTERS_PER_TOKEN
        self.vocabulary_size = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str], prefix: str = "") -> list[EmbeddingInput]:
        """Token ids of each text, special tokens included."""
        encodings = self._tokenizer.encode_batch([prefix + text[: self._max_characters] for text in texts])
        return [
            EmbeddingInput(encoding.ids, bool(encoding.overflowing) or len(text) > self._max_characters)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def accept_ids(self, token_ids: Sequence[Sequence[int]]) -> list[EmbeddingInput]:
        """Token ids that a client made itself, used as they are. Raises `InvalidRequest`."""
        for ids in token_ids:
            if not ids:
                raise InvalidRequest("An empty list of token ids cannot be embedded.", param="input")
            if not all(0 <= token_id < self.vocabulary_size for token_id in ids):
                raise InvalidRequest(
                    f"Token ids of this model lie between 0 and {self.vocabulary_size - 1}; send text if your ids come "
                    "from another model's tokenizer.",
                    param="input",
                )
        return [EmbeddingInput(list(ids[: self._max_tokens]), len(ids) > self._max_tokens) for ids in token_ids]
