"""Reads what the headers of safetensors files say: names, types and shapes of tensors, without their values.

The format (https://huggingface.co/docs/safetensors): 8 bytes length, little endian, then that many bytes of JSON with
type, shape and place of each tensor, then the values. Only the standard library is needed, so this is quick enough to
run before anything starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cluster.errors import ModelDamaged

_MAX_HEADER_BYTES = 100_000_000
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}
# Enough of each tensor to tell two fine-tunes of one parent apart, and little enough to read in a moment.
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`offset` and `num_bytes` are places in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


def read_tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder, by name. Raises `ModelDamaged` for files that are cut or missing."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelDamaged(f"{folder} has no .safetensors weights: copy the whole checkpoint.")
    found: dict[str, TensorInfo] = {}
    for file in files:
        found.update(_read_file(file))
    _check_index(folder, found)
    return found


def fingerprint(folder: Path) -> str:
    """A short name of what a checkpoint holds: the same for a copy, another for any other training or noise.

    The first 24 hexadecimal digits of the sha256 over names, types, shapes and the first values of all tensors. It does
    not prove that nothing was changed; checksums do. Empty for weights in another format.
    """
    if not any(folder.glob("*.safetensors")):
        return ""
    digest = hashlib.sha256()
    for name, info in sorted(read_tensor_infos(folder).items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with info.file.open("rb") as file:
            file.seek(info.offset)
            digest.update(file.read(min(info.num_bytes, _SAMPLE_BYTES)))
    return digest.hexdigest()[:24]


def _read_file(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelDamaged(f"{path} is no safetensors file or was cut ({size} bytes). Copy the checkpoint again.")
        header = file.read(length)
    try:
        entries = json.loads(header)
        found = {name: _tensor(path, 8 + length, entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelDamaged(f"The header of {path} cannot be read ({error}). Copy the checkpoint again.") from error
    end = max((info.offset + info.num_bytes for info in found.values()), default=8 + length)
    if end != size:
        raise ModelDamaged(f"{path} has {size} bytes, but its header says {end}. Copy the checkpoint again.")
    return found


def _tensor(path: Path, start: int, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    bits = _BITS.get(entry["dtype"])
    if bits is not None and prod(shape) * bits // 8 != end - begin:
        raise ValueError(f"a tensor of shape {shape} and type {entry['dtype']} cannot have {end - begin} bytes")
    return TensorInfo(str(entry["dtype"]), shape, path, start + begin, end - begin)


def _check_index(folder: Path, found: Mapping[str, TensorInfo]) -> None:
    """A checkpoint in several files lists which tensor is in which; all of them must be there."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        promised = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        missing = sorted({file for name, file in promised.items() if name not in found})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelDamaged(f"{path} cannot be read ({error}). Copy the checkpoint again.") from error
    if missing:
        raise ModelDamaged(
            f"{folder} lacks {', '.join(map(str, missing))}, which its index names. Copy all of its files."
        )
