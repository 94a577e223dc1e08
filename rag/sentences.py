"""Cuts text into sentences and keeps their places. Good enough for quotes and citation marks in five languages; list
items and table rows count as sentences, code blocks stay whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

_ABBREVIATION_LIST = (
    "e.g i.e etc mr mrs ms dr prof st vs no nos fig eq approx cf al art p pp sec ch vol inc ltd u.s "
    "z.b d.h bzw usw ca nr abs str vgl u.a evtl ggf inkl "
    "m mme mlle av env ex sig sigg sig.ra dott ing pag ecc sr sra srta ud uds pág núm"
)
_ABBREVIATIONS = frozenset(_ABBREVIATION_LIST.split())
_END = re.compile(
    r"[.!?…]+[\"'»”’)\]]*(?:\s*\[\d+(?:\s*,\s*\d+)*\])*(?=\s|$)|\n(?:\s*\n|(?=\s*(?:[-*•|#>]|\d+[.)]\s)))"
)
_FENCE = re.compile(r"^```.*?(?:^```[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Span:
    """`text[start:end]`, without blanks around it."""

    start: int
    end: int


def split_sentences(text: str) -> list[Span]:
    """Sentences in order; they do not overlap and hold every non-blank character."""
    fences = [match.span() for match in _FENCE.finditer(text)]
    cuts = [0]
    for match in _END.finditer(text):
        inside_code = any(start <= match.start() < end for start, end in fences)
        if not inside_code and _ends_sentence(text, cuts[-1], match):
            cuts.append(match.end())
    cuts.append(len(text))
    spans = [_trim(text, start, end) for start, end in pairwise(cuts)]
    return [span for span in spans if span.start < span.end]


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    if not match.group().startswith("."):
        return True
    last_word = re.split(r"[\s(\[\"'«„“]", text[start : match.start()])[-1]
    rest = text[match.end() :].lstrip()
    if match.group() == "." and (last_word.lower() in _ABBREVIATIONS or re.fullmatch(r"[A-ZÄÖÜ]|\d+", last_word)):
        # "Dr. Weber", "J. Smith", "3. Oktober"; a number or initial may also end a sentence before a capital letter.
        return (
            bool(re.fullmatch(r"\d+", last_word)) and _is_new_sentence(rest) and start < match.start() - len(last_word)
        )
    return not rest[:1].islower()


def _is_new_sentence(rest: str) -> bool:
    return not rest or rest[0] == "[" or (rest[0].isupper() and not re.match(r"\w+ \d{4}", rest))


def _trim(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return Span(start, end)
