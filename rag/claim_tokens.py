"""A text as tokens that can be compared: words in all their spellings, numbers with their units, names, clauses.

What `rag.support` compares an answer's sentence and a passage by. Pure functions of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rag.bm25 import spellings
from rag.language import STOP_WORDS, Language, detect_language
from rag.quantities import (
    CURRENCY_SIGNS,
    NUMBER_PATTERN,
    UNITS,
    magnitude_of,
    number_word,
    readings,
    times_power,
)

_TOKEN = re.compile(rf"(?P<number>{NUMBER_PATTERN})|(?P<word>[^\W\d_]+)|(?P<sign>[%$€£])|(?P<border>[,;:()—–!?\n])")
_LIST_NUMBER = re.compile(r"\s*\d+[.)]\s")
_ORDINAL_ENDINGS = frozenset(["st", "nd", "rd", "th"])
_CONJUNCTIONS = frozenset(["and", "und", "et", "e", "ed", "y", "but", "aber", "mais", "ma", "pero", "while", "während"])
_WEAK_WORDS = """
    every each one ones per about around also another approximately pro etwa rund circa ca heute dont environ aussi
    chaque aujourd hui anche oggi ogni cada unos unas aproximadamente hoy
"""
_WEAK = frozenset(_WEAK_WORDS.split())
"""Words that say nothing of their own, beside the function words of a language."""
_LINKS = frozenset(["de", "of", "di", "d", "per", "pour", "por"])
"""Words between a number and its unit: `30 millones de libras`, `12 per cento`."""


@dataclass(frozen=True, slots=True)
class Token:
    """One word or number. `forms` are what it may be written as; of a number its readings, marked with `#`. Tokens of
    different `clause` are parted by punctuation. `unit` is that of a number."""

    place: int
    clause: int
    written: str
    forms: frozenset[str]
    is_number: bool = False
    is_content: bool = False
    is_name: bool = False
    unit: str | None = None

    @property
    def lower(self) -> str:
        return self.written.lower()


def read_tokens(text: str, language: Language | None = None) -> list[Token]:
    """Tokens in order, numbers with units attached. The number of a list item is none."""
    language = language or detect_language(text)
    item = _LIST_NUMBER.match(text)
    raw = list(_raw_tokens(text[item.end() :] if item else text, language))
    return [_with_unit(raw, index, language) if token.is_number else token for index, token in enumerate(raw)]


def _raw_tokens(text: str, language: Language | None) -> Iterator[Token]:
    stop_words = STOP_WORDS[language or "en"]
    place = clause = 0
    is_first = True
    for match in _TOKEN.finditer(text):
        written = match.group()
        if match.lastgroup == "border":
            clause += 1
            # What follows these is written with a capital whatever it is. A full stop inside a sentence ends an
            # abbreviation, and parts nothing.
            is_first = is_first or written in "!?:\n"
            continue
        if match.lastgroup == "number":
            yield Token(place, clause, written, _as_forms(readings(written)), is_number=True)
        elif match.lastgroup == "sign":
            yield Token(place, clause, written, frozenset([written]))
        elif (digits := number_word(written.lower(), language)) is not None:
            forms = _as_forms(frozenset([digits])) | {written.lower()}
            yield Token(place, clause, written, forms, is_number=True)
        else:
            lower = written.lower()
            is_content = lower not in stop_words and lower not in _WEAK and len(lower) > 1
            is_name = is_content and written[0].isupper() and not is_first
            yield Token(place, clause, written, frozenset(spellings(lower)), False, is_content, is_name)
        place += 1
        is_first = False
        clause += written.lower() in _CONJUNCTIONS


def _as_forms(numbers: frozenset[str]) -> frozenset[str]:
    """Kept apart from words: `1200` may be part of a word such as `F-1200`."""
    return frozenset(f"#{number}" for number in numbers)


def _with_unit(tokens: Sequence[Token], index: int, language: Language | None) -> Token:
    token = tokens[index]
    following = [later.lower for later in tokens[index + 1 : index + 5] if later.clause == token.clause]
    sign = tokens[index - 1].written if index and tokens[index - 1].written in CURRENCY_SIGNS else None
    while following and (following[0] in _LINKS or following[0] in _ORDINAL_ENDINGS):
        following.pop(0)
    power = magnitude_of(following[0], language) if following else None
    if sign is not None and following and following[0] in ("m", "k"):
        power = 6 if following[0] == "m" else 3
    if power is not None:
        numbers = frozenset(form[1:] for form in token.forms if form.startswith("#"))
        token = replace(token, forms=_as_forms(times_power(numbers, power)))
        following.pop(0)
        while following and following[0] in _LINKS:
            following.pop(0)
    unit = UNITS.get(sign) if sign else UNITS.get(following[0]) if following else None
    return replace(token, unit=unit)


def forms_of(tokens: Iterable[Token]) -> frozenset[str]:
    """All that the tokens may be written as."""
    return frozenset(form for token in tokens for form in token.forms)


def join_sentences(sentences: Sequence[Sequence[Token]]) -> list[Token]:
    """The tokens of several sentences as one run; none shares a clause with the next sentence's."""
    joined: list[Token] = []
    for tokens in sentences:
        place = len(joined)
        clause = joined[-1].clause + 1 if joined else 0
        joined += [replace(token, place=place + token.place, clause=clause + token.clause) for token in tokens]
    return joined
