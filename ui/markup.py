"""From untrusted text to what the page may show: escaped HTML, and Markdown that holds no HTML and loads nothing.

The chat sanitizes once more in the browser and the page's content policy forbids foreign addresses; this is the first
of three lines of defence, and the one that makes tags visible as text instead of dropping them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Collection

# A code block up to its closing fence (or the end, while the text still streams), or a span of code in a line.
_CODE = re.compile(
    r"(?P<block>^[ \t]{0,3}(?P<fence>`{3,}|~{3,})[^\n]*(?:\n|\Z)(?:.*?)(?:^[ \t]{0,3}(?P=fence)[`~]*[ \t]*$|\Z))"
    r"|(?P<span>(?<!`)(?P<ticks>`+)(?!`)(?:[^`\n]|(?!(?P=ticks)(?!`))`)+(?P=ticks)(?!`))",
    re.MULTILINE | re.DOTALL,
)
# The page would draw these as diagrams, a large machine to feed with untrusted text.
_DIAGRAM = re.compile(r"^([ \t]{0,3}(?:`{3,}|~{3,})[ \t]*)mermaid", re.IGNORECASE)
_IMAGE = re.compile(r"!(?=\[)")
_SPECIAL = re.compile(r"([!-/:-@\[-`{-~])")
_UNCONFIRMED = " *(not confirmed)*"
_MARK = re.compile(r"\[(\d{1,3})\](?!\()")


def escape(text: object) -> str:
    """Text for HTML content and quoted attributes."""
    return html.escape(str(text), quote=True)


def safe_markdown(text: str) -> str:
    """Markdown in which tags are text and images are links; code stays as it is."""
    return _outside_code(text, lambda part: _IMAGE.sub("", part).replace("<", "&lt;"))


def plain_markdown(text: str) -> str:
    """Markdown that shows exactly this text, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def link_marks(text: str, message_id: str, numbers: Collection[int]) -> str:
    """Turn each `[n]` that has a citation into a link that the page opens as a source; others stay as they are."""

    def link(match: re.Match[str]) -> str:
        number = int(match[1])
        return f"[\\[{number}\\]](#cite-{message_id}-{number})" if number in numbers else match[0]

    return _outside_code(text, lambda part: _MARK.sub(link, part))


def mark_places(text: str, places: Collection[tuple[int, int]]) -> str:
    """The Markdown with a note behind each place (start, end) that no source confirms; blanks at its end stay there."""
    for _, end in sorted(places, reverse=True):
        end = len(text[:end].rstrip())
        text = f"{text[:end]}{_UNCONFIRMED}{text[end:]}"
    return text


def code_block(text: str) -> str:
    """A fenced block whose content cannot close it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    parts: list[str] = []
    position = 0
    for match in _CODE.finditer(text):
        parts.append(change(text[position : match.start()]))
        parts.append(_DIAGRAM.sub(r"\1text", match[0]))
        position = match.end()
    parts.append(change(text[position:]))
    return "".join(parts)
