"""Bytes to text for plain text formats: byte order marks, UTF-8, UTF-16 without a mark, otherwise a guess."""

from __future__ import annotations

import codecs
import re

from charset_normalizer import from_bytes

from rag.filetypes import utf16_without_mark

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE_BYTES = 65536
_FORBIDDEN = re.compile("[\x00\ud800-\udfff]")
"""Characters that databases and UTF-8 refuse."""


def decode_text(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Text with `\\n` line ends, and warnings for people. Never fails: unreadable bytes become U+FFFD and a warning."""
    for mark, codec in _MARKS:
        if data.startswith(mark):
            return _decode(data[len(mark) :], codec)
    try:
        return clean_text(data.decode("utf-8")), ()
    except UnicodeDecodeError:
        return _decode(data, utf16_without_mark(data[:_SAMPLE_BYTES]) or _guess_codec(data))


def clean_text(text: str) -> str:
    """Line ends as `\\n`; characters that cannot be stored become U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def _decode(data: bytes, codec: str) -> tuple[str, tuple[str, ...]]:
    try:
        return clean_text(data.decode(codec)), ()
    except UnicodeDecodeError:
        text = data.decode(codec, "replace")
        warning = f"Read as {codec}; {text.count(chr(0xFFFD))} characters could not be decoded."
        return clean_text(text), (warning,)


def _guess_codec(data: bytes) -> str:
    # cp1252 leaves five bytes undefined; Latin-1 has a character for each, so the last resort always decodes.
    guesses = from_bytes(data[:_SAMPLE_BYTES])
    best = guesses.best()
    if best is None:
        return "latin-1"
    # Short texts fit several Latin code pages equally well: then the most common one wins.
    western = next((guess for guess in guesses if guess.encoding == "cp1252"), None)
    if western is not None and best.encoding != "cp1252" and western.coherence >= best.coherence:
        return "cp1252"
    return best.encoding
