"""Bodies as they were before compression, counted after it: a small answer that unpacks to gigabytes is cut off."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

from services.web.errors import FetchError

ACCEPTED = "gzip, deflate, identity"
_PIECE_BYTES = 1 << 16


class Decoder(Protocol):
    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decoded pieces of bounded size, made only as far as they are asked for."""

    def check_end(self) -> None:
        """Raise `FetchError` where the body ended too early."""


def decoder_for(encoding: str) -> Decoder:
    """By the `Content-Encoding` of an answer. Raises `FetchError` where we did not ask for it and cannot read it."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return _Plain()
    if name in ("gzip", "x-gzip", "deflate"):
        return _Zlib()
    raise FetchError(
        f"The server packed its answer as {encoding[:40]!r}, which was not asked for and is not read here.",
        code="type_refused",
    )


class _Plain:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def check_end(self) -> None:
        pass


class _Zlib:
    """gzip and deflate, the latter with or without its zlib header (servers send both)."""

    def __init__(self) -> None:
        self._inflate: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._inflate is None and data:
            is_wrapped = data[:2] == b"\x1f\x8b" or data[0] & 0x0F == 8
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32 if is_wrapped else -zlib.MAX_WBITS)
        while data and self._inflate is not None and not self._inflate.eof:
            try:
                piece = self._inflate.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise FetchError(f"The answer is packed in a broken way ({error}).", code="incomplete") from error
            data = self._inflate.unconsumed_tail
            if piece:
                yield piece

    def check_end(self) -> None:
        if self._inflate is not None and not self._inflate.eof:
            raise FetchError("The answer broke off: its packed body has no end. Try again.", code="incomplete")
