"""Reads the key-value part of a GGUF file: context length, vocabulary, chat template. Never touches the tensors.

Vocabularies have up to a few hundred thousand strings, and this runs at every start: hence no general GGUF library,
which takes seconds for it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cluster.errors import ModelDamaged

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_KEYS = 1 << 16


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """Key-value pairs of one file. Strings are bytes in `values`: vocabularies hold tokens that are not UTF-8."""

    path: Path
    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return self.text("general.architecture") or "unknown"

    @property
    def max_context(self) -> int | None:
        """Tokens that the model was trained for."""
        return self._of_architecture("context_length")

    @property
    def num_layers(self) -> int | None:
        return self._of_architecture("block_count")

    @property
    def num_experts(self) -> int:
        """Experts of a sparse mixture; 0 for a dense model."""
        return self._of_architecture("expert_count") or 0

    @property
    def num_cached_values_per_token(self) -> int | None:
        """Numbers that one token takes in the key-value cache, over all layers."""
        heads = self._over_layers("attention.head_count")
        kv_heads = self._over_layers("attention.head_count_kv") or heads
        width = self._of_architecture("embedding_length")
        if not heads or kv_heads is None or width is None or self.num_layers is None:
            return None
        head_width = width * self.num_layers // heads
        key_width = self._of_architecture("attention.key_length") or head_width
        value_width = self._of_architecture("attention.value_length") or head_width
        return kv_heads * (key_width + value_width)

    @property
    def tokens(self) -> list[bytes]:
        """The vocabulary, as the tokenizer spells it."""
        return list(self.values.get("tokenizer.ggml.tokens", ()))

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else None

    def special_token(self, name: str) -> str:
        """Text of the `bos`, `eos`, `unknown` or `padding` token; empty where the model has none."""
        token_id = self.values.get(f"tokenizer.ggml.{name}_token_id")
        tokens = self.values.get("tokenizer.ggml.tokens", ())
        if token_id is None or not 0 <= token_id < len(tokens):
            return ""
        return cast(bytes, tokens[token_id]).decode("utf-8", "replace")

    def _of_architecture(self, key: str) -> int | None:
        value = self.values.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) else None

    def _over_layers(self, key: str) -> int | None:
        """Sum over all layers of a number that is one for all of them, or a list where they differ."""
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            return sum(value)
        return value * self.num_layers if isinstance(value, int) and self.num_layers is not None else None


def read_gguf_metadata(path: Path) -> GgufMetadata:
    """Raises `ModelDamaged` when the file is no GGUF file or is cut off inside its metadata."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return GgufMetadata(path, _Reader(data).read())
    except FileNotFoundError as error:
        raise ModelDamaged(f"{path} does not exist. Prepare the model again or correct its path.") from error
    except (struct.error, ValueError, KeyError, IndexError) as error:
        raise ModelDamaged(f"{path} is not a readable GGUF file ({error}). Fetch or copy it again.") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise ValueError(f"its first bytes are {self._data[:4]!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"format version {version} is not 2 or 3")
        self._scalar("Q")  # number of tensors
        num_keys = self._scalar("Q")
        if num_keys > _MAX_KEYS:
            raise ValueError(f"it claims {num_keys} keys")
        return {self._string().decode("utf-8", "replace"): self._value(self._scalar("I")) for _ in range(num_keys)}

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> bytes:
        size = self._scalar("Q")
        end = self._at + size
        if end > len(self._data):
            raise ValueError("it is cut off")
        value = self._data[self._at : end]
        self._at = end
        return value

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._scalar("I"), self._scalar("Q")
        if count > len(self._data):
            raise ValueError("it is cut off")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            values = list(struct.unpack_from(code, self._data, self._at))
            self._at += struct.calcsize(code)
            return values
        return [self._value(kind) for _ in range(count)]
