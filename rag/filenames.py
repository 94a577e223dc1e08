"""File names as people typed them, made safe to show. A cleaned name is a label: it is never used as a path."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

from rag.errors import ParseError

MAX_NAME_CHARACTERS = 200
FOLDER_MARK = " › "
"""Stands for the slash in names of documents that come from folders: names hold no slashes, and files of the same last
part must stay apart."""


def clean_filename(name: str) -> str:
    """The last path part of `name` without control and direction marks, at most 200 characters, its ending kept.

    Raises `ParseError` (`bad_filename`) where nothing readable is left.
    """
    last_part = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    visible = "".join(" " if c.isspace() else c for c in last_part if c.isspace() or not _is_invisible(c))
    cleaned = unicodedata.normalize("NFC", " ".join(visible.split()))
    if not cleaned.strip("."):
        raise ParseError(
            f"{name[:80]!r} is not a file name. Give the file a name such as report.pdf.", code="bad_filename"
        )
    return _shorten(cleaned)


def name_of_path(parts: Sequence[str]) -> str:
    """One name for a file below a folder. Different paths get different names, also where they are too long or hold
    what is not shown (control and direction marks): those end in a part of their hash."""
    plain = FOLDER_MARK.join(parts)
    if len(plain) <= MAX_NAME_CHARACTERS and not any(FOLDER_MARK.strip() in part or "\\" in part for part in parts):
        try:
            if clean_filename(plain) == unicodedata.normalize("NFC", plain):
                return unicodedata.normalize("NFC", plain)
        except ParseError:
            pass  # Nothing of it can be shown: the hash alone names it.
    mark = hashlib.sha256("/".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    ending = extension_of(parts[-1])
    tail = f"…{mark}.{ending}" if ending.isalnum() else f"…{mark}"
    visible = "".join(c for c in plain.replace("\\", "-") if c == " " or not (c.isspace() or _is_invisible(c)))
    return unicodedata.normalize("NFC", " ".join(visible.split()))[: MAX_NAME_CHARACTERS - len(tail)] + tail


def extension_of(name: str) -> str:
    """Lower-case ending of `name` without the dot, or an empty string."""
    stem, dot, ending = name.rpartition(".")
    return ending.lower() if dot and stem and len(ending) <= 12 else ""


def _is_invisible(character: str) -> bool:
    """Control, format (right-to-left overrides among them), private, unassigned characters and halves of pairs."""
    return unicodedata.category(character).startswith("C")


def _shorten(name: str) -> str:
    if len(name) <= MAX_NAME_CHARACTERS:
        return name
    ending = extension_of(name)
    kept = MAX_NAME_CHARACTERS - len(ending) - 2
    return f"{name[:kept]}….{ending}" if ending else name[: MAX_NAME_CHARACTERS - 1] + "…"
