"""Headings of parsed text: Markdown's `#` lines, underlined lines (Markdown, reStructuredText), Org's `*` lines."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

MAX_HEADING_CHARACTERS = 200

_HASH = re.compile(r"^(#{1,6})[ \t]+(\S.*?)[ \t#]*$", re.MULTILINE)
_UNDERLINED = re.compile(r"^(?![ \t|\-=~^*+#>])(\S[^\n]{0,199})\n([=\-~^])\2{2,}[ \t]*$", re.MULTILINE)
_STARS = re.compile(r"^(\*{1,6})[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~).*?(?:^\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
# In these a `#` or a row of dashes is data or a remark.
_WITHOUT_HEADINGS = frozenset(
    {
        "application/pdf",
        "application/json",
        "application/xml",
        "application/yaml",
        "application/x-subrip",
        "message/rfc822",
        "text/csv",
        "text/plain",
        "text/tab-separated-values",
        "text/vtt",
    }
)


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading whose line starts at character `start`; level 1 is the outermost."""

    start: int
    level: int
    text: str


class Outline:
    """The headings of one text, in order."""

    def __init__(self, headings: list[Heading]) -> None:
        self.headings = headings
        self._starts = [heading.start for heading in headings]
        self._paths: list[tuple[str, ...]] = []
        open_headings: list[Heading] = []
        for heading in headings:
            while open_headings and open_headings[-1].level >= heading.level:
                open_headings.pop()
            open_headings.append(heading)
            self._paths.append(tuple(each.text for each in open_headings))

    def path_at(self, position: int) -> tuple[str, ...]:
        """Headings above a character, from the outermost to the innermost."""
        index = bisect_right(self._starts, position)
        return self._paths[index - 1] if index else ()


def find_headings(text: str, mime_type: str) -> Outline:
    if mime_type in _WITHOUT_HEADINGS:
        return Outline([])
    if mime_type == "text/x-org":
        return Outline([_heading(found, len(found[1]), found[2]) for found in _STARS.finditer(text)])
    code = [(found.start(), found.end()) for found in _FENCE.finditer(text)]
    hashes = [_heading(found, len(found[1]), found[2]) for found in _HASH.finditer(text)]
    ranks: dict[str, int] = {}
    # An underline's rank is the order in which its character first appears (reStructuredText's rule).
    underlined = [
        _heading(found, ranks.setdefault(found[2], len(ranks) + 1), found[1]) for found in _UNDERLINED.finditer(text)
    ]
    ordered = sorted(hashes + underlined, key=lambda heading: heading.start)
    return Outline(_outside(ordered, code))


def _heading(found: re.Match[str], level: int, text: str) -> Heading:
    return Heading(found.start(), level, " ".join(text.replace("**", "").split())[:MAX_HEADING_CHARACTERS])


def _outside(headings: list[Heading], blocks: list[tuple[int, int]]) -> list[Heading]:
    starts = [start for start, _ in blocks]

    def is_inside(position: int) -> bool:
        index = bisect_right(starts, position)
        return index > 0 and position < blocks[index - 1][1]

    return [heading for heading in headings if not is_inside(heading.start)]
