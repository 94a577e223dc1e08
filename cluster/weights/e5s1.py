"""Reads the E5S1 file format: an E5 sentence encoder with its Unigram vocabulary in one file, matrices in 4 bits.

Only reads; what the numbers mean (names, prefixes, pooling) is the business of the writers beside this module. Offsets
and sizes come from the file and are checked before use, so that a damaged file gives an error instead of nonsense.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.errors import ModelDamaged

MAGIC = b"E5S1"
BLOCK = 32
"""Weights that share a scale."""
BLOCK_BYTES = 18
"""A float16 scale and 32 numbers of 4 bits."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class E5Shape:
    hidden: int
    num_layers: int
    num_heads: int
    feed_forward: int
    vocabulary: int
    max_positions: int
    num_types: int
    norm_epsilon: float


@dataclass(frozen=True, slots=True)
class E5Vocabulary:
    """Unigram pieces with their log probabilities; the list index is the token id."""

    pieces: list[str]
    scores: list[float]
    bos: int
    eos: int
    pad: int
    unk: int


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor as it lies in the file: float32 numbers, or blocks of 4 bits (`is_packed`)."""

    raw: npt.NDArray[np.uint8]
    num_values: int
    is_packed: bool

    def blocks(self) -> npt.NDArray[np.uint8]:
        """Shape (number of blocks, 18): the layout is that of Q4_0 in GGUF."""
        return self.raw.reshape(-1, BLOCK_BYTES)

    def values(self) -> FloatArray:
        """All values as float32, exactly."""
        if not self.is_packed:
            return self.raw.view("<f4").astype(np.float32)
        blocks = self.blocks()
        scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
        nibbles = blocks[:, 2:]
        low, high = nibbles & 0x0F, nibbles >> 4
        signed = np.concatenate([low, high], axis=1).astype(np.int8) - np.int8(8)
        return (signed.astype(np.float32) * scales).reshape(-1)


@dataclass(frozen=True, slots=True)
class E5File:
    shape: E5Shape
    vocabulary: E5Vocabulary
    tensors: dict[str, PackedTensor]

    def matrix(self, name: str, num_rows: int, num_columns: int) -> FloatArray:
        return self._checked(name, num_rows * num_columns).values().reshape(num_rows, num_columns)

    def vector(self, name: str, length: int) -> FloatArray:
        return self._checked(name, length).values()

    def _checked(self, name: str, num_values: int) -> PackedTensor:
        tensor = self.tensors.get(name)
        if tensor is None or tensor.num_values != num_values:
            found = "missing" if tensor is None else f"of {tensor.num_values} values"
            raise ModelDamaged(f"Tensor {name} is {found}, {num_values} values were expected.")
        return tensor


def read_e5s1(path: Path) -> E5File:
    """Read a whole file. Raises `ModelDamaged` when it is not what it should be."""
    data = np.fromfile(path, dtype=np.uint8)
    try:
        return _Reader(data.tobytes(), data).read()
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ModelDamaged(f"{path} is damaged: {error}. Install its package again.") from error


class _Reader:
    """A cursor over the header; tensors are views of the whole file."""

    def __init__(self, header: bytes, data: npt.NDArray[np.uint8]) -> None:
        self._bytes = header
        self._data = data
        self._position = 0

    def read(self) -> E5File:
        if self._bytes[:4] != MAGIC:
            raise ValueError("it does not start with E5S1")
        self._position = 4
        version, hidden, layers, heads, wide, words, positions, types, epsilon, block = self._take("<I7ifi")
        if version != 1 or block != BLOCK:
            raise ValueError(f"version {version} with blocks of {block} is unknown")
        shape = E5Shape(hidden, layers, heads, wide, words, positions, types, norm_epsilon=epsilon)
        vocabulary = self._read_vocabulary()
        _, map_bytes = self._take("<iI")
        self._position += map_bytes  # a table of NFKC replacements: the tokenizer library has its own
        (num_tensors,) = self._take("<i")
        tensors = dict(self._read_tensor() for _ in range(num_tensors))
        return E5File(shape, vocabulary, tensors)

    def _take(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from(layout, self._bytes, self._position)
        self._position += struct.calcsize(layout)
        return values

    def _take_array(self, dtype: str, length: int) -> npt.NDArray[np.generic]:
        array = np.frombuffer(self._bytes, dtype, length, self._position)
        self._position += array.nbytes
        return array

    def _read_vocabulary(self) -> E5Vocabulary:
        num_pieces, bos, eos, pad, unk, blob_bytes = self._take("<5iQ")
        offsets = self._take_array("<u4", num_pieces + 1).tolist()
        scores = self._take_array("<f4", num_pieces).tolist()
        blob = bytes(self._take_array("u1", blob_bytes))
        if offsets[-1] > len(blob):
            raise ValueError("the vocabulary is longer than its text")
        pieces = [blob[start:end].decode() for start, end in itertools.pairwise(offsets)]
        return E5Vocabulary(pieces, scores, bos, eos, pad, unk)

    def _read_tensor(self) -> tuple[str, PackedTensor]:
        (name_bytes,) = self._take("<H")
        name = bytes(self._take_array("u1", name_bytes)).decode()
        kind, num_values, offset, num_bytes = self._take("<BIQQ")
        is_packed = kind == 1
        expected = num_values // BLOCK * BLOCK_BYTES if is_packed else num_values * 4
        if kind not in (0, 1) or num_bytes != expected or offset + num_bytes > self._data.size:
            raise ValueError(f"tensor {name} does not fit")
        return name, PackedTensor(self._data[offset : offset + num_bytes], num_values, is_packed)
