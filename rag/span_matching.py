"""Finds a span of a parsed text among the characters of a drawn page, where both hold the same words differently.

A parser joins lines, resolves hyphens and ligatures, and puts in marks of its own; a page draws glyphs. Compared are
letters and digits alone, without case and accents (Unicode NFKD), so none of that matters. Where the order differs too
(columns, tables), runs of equal words are matched instead, and only when they are most of the span.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import accumulate

_MIN_SHARE = 0.6
"""Share of the span's letters that has to be found in runs of words; below it nothing is marked."""
_MIN_RUN_WORDS = 3
_MAX_WORDS = 20_000
_WORD = re.compile(r"\S+")


def find_on_page(page_text: str, start: int, end: int, drawn: Sequence[str]) -> list[tuple[int, int]]:
    """Ranges of `drawn` (one string per drawn character) that show `page_text[start:end]`, in order; empty where the
    page does not show it. `page_text` is the whole parsed text of that page: it tells equal places apart."""
    start, end = max(0, start), min(len(page_text), end)
    wanted, _ = _letters(page_text[start:end])
    shown, places = _letters(drawn)
    if not wanted or not shown:
        return []
    found = _occurrences(wanted, shown)
    if found:
        before, _ = _letters(page_text[:start])
        whole, _ = _letters(page_text)
        at = _same_occurrence(found, _occurrences(wanted, whole), len(before), len(whole), len(shown))
        return _joined([places[position] for position in range(at, at + len(wanted))])
    return _by_words(page_text[start:end], drawn, len(wanted))


def _letters(characters: Sequence[str]) -> tuple[str, list[int]]:
    """Letters and digits in their plainest form, and for each the index of the character that it came from."""
    plain: list[str] = []
    places: list[int] = []
    for index, character in enumerate(characters):
        if character.isascii():
            folded = character.lower() if character.isalnum() else ""
        else:
            folded = "".join(c for c in unicodedata.normalize("NFKD", character).casefold() if c.isalnum())
        plain.append(folded)
        places.extend([index] * len(folded))
    return "".join(plain), places


def _occurrences(wanted: str, text: str) -> list[int]:
    found: list[int] = []
    position = text.find(wanted)
    while position >= 0:
        found.append(position)
        position = text.find(wanted, position + 1)
    return found


def _same_occurrence(found: list[int], known: list[int], before: int, num_known: int, num_shown: int) -> int:
    """The occurrence on the page that is the span's: the one of the same rank, or the nearest by its share of the
    page where the page and the text disagree about how many there are."""
    if len(found) == len(known) and before in known:
        return found[known.index(before)]
    expected = before / max(1, num_known)
    return min(found, key=lambda position: abs(position / num_shown - expected))


def _by_words(span: str, drawn: Sequence[str], num_letters: int) -> list[tuple[int, int]]:
    wanted = [word for match in _WORD.finditer(span) if (word := _letters(match[0])[0])]
    ends = list(accumulate(len(character) for character in drawn))
    words: list[tuple[str, int, int]] = []
    index = 0
    for match in _WORD.finditer("".join(drawn)):
        while ends[index] <= match.start():
            index += 1
        first = index
        while ends[index] < match.end():
            index += 1
        if word := _letters(match[0])[0]:
            words.append((word, first, index + 1))
    if len(words) > _MAX_WORDS or len(wanted) > _MAX_WORDS:
        return []
    runs = _runs(wanted, [word for word, _, _ in words])
    num_found = sum(len(word) for at, _, size in runs for word in wanted[at : at + size])
    if num_found < _MIN_SHARE * num_letters:
        return []
    return sorted((words[place][1], words[place + size - 1][2]) for _, place, size in runs)


def _runs(wanted: Sequence[str], words: Sequence[str]) -> list[tuple[int, int, int]]:
    """(place in `wanted`, place in `words`, number of words): the longest run first, then those of what it leaves on
    either side, each looked for on the whole page, because columns may stand in any order."""
    matcher = SequenceMatcher(None, wanted, words, autojunk=False)
    shortest = min(_MIN_RUN_WORDS, len(wanted))
    left = [(0, len(wanted))]
    runs: list[tuple[int, int, int]] = []
    while left:
        first, last = left.pop()
        run = matcher.find_longest_match(first, last, 0, len(words))
        if run.size >= shortest:
            runs.append((run.a, run.b, run.size))
            left += [(first, run.a), (run.a + run.size, last)]
    return runs


def _joined(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Rising indices as ranges; what lies between two of them (blanks, hyphens) belongs to the span too."""
    return [(indices[0], indices[-1] + 1)]
