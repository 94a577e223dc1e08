"""XML to text: what stands in its elements, one line each; web pages inside of it (as in feeds) become their text."""

from __future__ import annotations

from xml.etree import ElementTree

from rag.html_text import html_to_text


def xml_to_text(data: bytes) -> str:
    """Text of a document. Raises `ValueError` where it is damaged."""
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"it is not well-formed: {error}") from error
    return "\n".join(_readable(piece) for piece in root.itertext() if piece.strip())


def _readable(piece: str) -> str:
    return f"\n{html_to_text(piece)[0]}\n" if "</" in piece else piece.strip()
