"""Patterns of files to leave out, one a line, as in a `.windfarmignore` file.

A small part of what git understands: `#` begins a remark, `*`, `?` and `[]` match inside a name, a pattern with a slash
is meant from the folder itself (`**` spans folders), one without matches a name at any depth, one that ends in a
slash matches folders. What lies below a matching folder is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

FILE_NAME = ".windfarmignore"


@dataclass(frozen=True, slots=True)
class _Pattern:
    expression: re.Pattern[str]
    only_folders: bool
    is_anchored: bool


class Ignore:
    def __init__(self, lines: Iterable[str]) -> None:
        stripped = (line.strip() for line in lines)
        self._patterns = [_pattern(line) for line in stripped if line and not line.startswith("#")]

    def matches(self, path: PurePosixPath, *, is_folder: bool) -> bool:
        """Whether a path below the folder is left out, itself or with a folder above it."""
        parts = path.parts
        return any(
            self._matches_alone(parts[: depth + 1], is_folder=is_folder or depth + 1 < len(parts))
            for depth in range(len(parts))
        )

    def _matches_alone(self, parts: tuple[str, ...], *, is_folder: bool) -> bool:
        return any(
            pattern.expression.fullmatch("/".join(parts) if pattern.is_anchored else parts[-1]) is not None
            for pattern in self._patterns
            if is_folder or not pattern.only_folders
        )


def _pattern(line: str) -> _Pattern:
    only_folders = line.endswith("/")
    text = line.rstrip("/")
    is_anchored = "/" in text
    return _Pattern(re.compile(_expression(text.lstrip("/"))), only_folders, is_anchored)


def _expression(pattern: str) -> str:
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern)
    known = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(known.get(piece) or (_class(piece) if piece[:1] == "[" else re.escape(piece)) for piece in pieces)


def _class(piece: str) -> str:
    """`[a-z]` and `[!a-z]`; a bracket that closes nothing stands for itself."""
    if len(piece) < 3:
        return re.escape(piece)
    inner = piece[1:-1].replace("\\", r"\\")
    return f"[^{inner[1:]}]" if inner[0] == "!" else f"[{inner}]"
