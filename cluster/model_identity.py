"""Names what token ids of a model mean: a digest of its weights and tokenizer, equal for copies of its files alone.

An answer goes on at another replica from the token ids that were sent, and those are worth nothing to a model that came
under the same name meanwhile. It is taken while a replica starts, so large files are sampled and not read as a whole:
it tells versions apart and proves no integrity, which is the business of checksums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

# Vocabularies are read as a whole: files of a tokenizer, and the head of a GGUF file.
_HEAD_BYTES = 16 << 20
_NUM_SAMPLES, _SAMPLE_BYTES = 1024, 4096
_SUFFIXES = {".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".tiktoken"}
# Options of the engines that change what is computed from the same files, or how they spell a text.
_TELLING_OPTIONS = {
    "control_vectors",
    "hf_overrides",
    "kv_overrides",
    "lora_adapters",
    "model_class_overrides",
    "quantization",
    "tokenizer_mode",
}
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def model_identity(location: Path, options: Mapping[str, Any]) -> str:
    """Of a .gguf file or a checkpoint's folder, run with these `engine_options`: 24 hexadecimal digits.

    Names and places outside the folder do not count. Raises `OSError` where a file cannot be read.
    """
    digest = blake2b(digest_size=12)
    for name, path in _files(location):
        digest.update(f"{name}\n{path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        _read_into(digest, path)
    telling = {name: value for name, value in options.items() if name in _TELLING_OPTIONS}
    digest.update(json.dumps(telling, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _files(location: Path) -> list[tuple[str, Path]]:
    """What counts, with its name within the model."""
    if location.is_dir():
        found = sorted(path for path in location.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
        return [(path.relative_to(location).as_posix(), path) for path in found]
    if part := _PART.search(location.name):
        stem = location.name[: part.start()]
        parts = sorted(path for path in location.parent.iterdir() if _is_part(path.name, stem, part[1]))
        return [(path.name.removeprefix(stem), path) for path in parts]
    return [("", location)]


def _is_part(name: str, stem: str, of: str) -> bool:
    part = _PART.search(name)
    return part is not None and name[: part.start()] == stem and part[1] == of


def _read_into(digest: blake2b, path: Path) -> None:
    """The head, and samples at equal distances from what lies behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        rest = size - _HEAD_BYTES
        if rest <= 0:
            return
        for number in range(_NUM_SAMPLES):
            file.seek(_HEAD_BYTES + max(0, rest - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
