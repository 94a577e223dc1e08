"""Frames between a model replica and the endpoint: pure coding, no transport.

A frame is a 16-byte header (kind, number of token ids, number of characters, payload bytes; four big-endian u32), the
token ids as u32, and the payload. The endpoint forwards payloads unparsed; token ids and how many characters of text
the payload shows are what it needs to have the stream continued on another replica.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

CONTENT_TYPE = "application/x-windfarm-frames"
MAX_TOKEN_IDS = 1 << 20
MAX_PAYLOAD_BYTES = 64 << 20

_HEADER = struct.Struct(">IIII")


class FrameKind(IntEnum):
    DATA = 0
    END = 1
    ERROR = 2
    KEEP_ALIVE = 3


class FrameError(ValueError):
    """The bytes are no frames; the stream cannot be trusted any further."""


class Frame(NamedTuple):
    """One decoded frame. A stream is complete only when an END frame came."""

    kind: FrameKind
    packed_token_ids: bytes
    payload: bytes
    num_characters: int = 0
    """Of the answer's text, in the payload."""

    @property
    def num_token_ids(self) -> int:
        return len(self.packed_token_ids) // 4

    @property
    def has_tokens(self) -> bool:
        """Whether something of the answer is in it: a role or a sign of life is not. A remote API tells text alone."""
        return bool(self.packed_token_ids or self.num_characters)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return unpack_token_ids(self.packed_token_ids)

    def json(self) -> Any:
        return json.loads(self.payload)


def unpack_token_ids(packed: bytes | bytearray) -> tuple[int, ...]:
    return struct.unpack(f">{len(packed) // 4}I", packed)


def encode_frame(
    kind: FrameKind, payload: bytes = b"", token_ids: Sequence[int] = (), num_characters: int = 0
) -> bytes:
    header = _HEADER.pack(kind, len(token_ids), num_characters, len(payload))
    if not token_ids:
        return header + payload
    return header + struct.pack(f">{len(token_ids)}I", *token_ids) + payload


def encode_end(finish_reason: str, usage: Mapping[str, int]) -> bytes:
    return encode_frame(FrameKind.END, _dump({"finish_reason": finish_reason, "usage": dict(usage)}))


def encode_error(type_: str, message: str, *, code: str | None = None, param: str | None = None) -> bytes:
    return encode_frame(FrameKind.ERROR, _dump({"type": type_, "message": message, "code": code, "param": param}))


KEEP_ALIVE_FRAME = encode_frame(FrameKind.KEEP_ALIVE)


class FrameDecoder:
    """Turns a byte stream, cut anywhere, into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes, in order."""
        buffer = self._rest + data if self._rest else data
        frames: list[Frame] = []
        position, size = 0, len(buffer)
        while size - position >= _HEADER.size:
            kind, num_ids, num_characters, num_bytes = _HEADER.unpack_from(buffer, position)
            if kind > FrameKind.KEEP_ALIVE or num_ids > MAX_TOKEN_IDS or num_bytes > MAX_PAYLOAD_BYTES:
                raise FrameError(f"Not a frame header: kind {kind}, {num_ids} token ids, {num_bytes} payload bytes.")
            ids_at = position + _HEADER.size
            payload_at = ids_at + 4 * num_ids
            end = payload_at + num_bytes
            if end > size:
                break
            frames.append(Frame(_KINDS[kind], buffer[ids_at:payload_at], buffer[payload_at:end], num_characters))
            position = end
        self._rest = buffer[position:]
        return frames

    def finish(self) -> None:
        """Say that no more bytes come; raises when the last frame is cut."""
        if self._rest:
            raise FrameError(f"The stream ended inside a frame ({len(self._rest)} bytes of it came).")


_KINDS = tuple(FrameKind)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
