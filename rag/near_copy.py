"""Sentences that repeat a sentence of a passage word by word: what was exchanged in them is then an alteration.

A paraphrase may say the same with other words; a copy in which one name or number stands for another does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal

from rag.claim_tokens import Token, forms_of

_COPIED = 0.75
"""Share of a sentence's tokens that stand in the same order in one sentence of the passage."""
_TITLE_WORDS = """
    mr mrs ms dr prof herr herrn frau monsieur madame mme signor signora señor señora sr sra
"""
_TITLES = frozenset(_TITLE_WORDS.split())


def is_verbatim(said: Sequence[Token], written: Sequence[Token]) -> bool:
    """Whether the sentence stands as it is in the passage's."""
    here, there = [token.lower for token in said], [token.lower for token in written]
    return bool(here) and any(there[start : start + len(here)] == here for start in range(len(there) - len(here) + 1))


def exchanged_in_copy(said: Sequence[Token], written: Sequence[Token]) -> Literal["name", "number"] | None:
    """What of a copy of `written` was exchanged: another name or number in the place of one."""
    here, there = [token.lower for token in said], [token.lower for token in written]
    matcher = SequenceMatcher(None, here, there, autojunk=False)
    if not here or sum(block.size for block in matcher.get_matching_blocks()) < _COPIED * len(here):
        return None
    exchanged: list[Token] = []
    for kind, start, end, first, last in matcher.get_opcodes():
        put, taken = _telling(said[start:end]), _telling(written[first:last])
        if kind == "replace" and taken:
            held = forms_of(taken)
            exchanged += [token for token in put if not token.forms & held]
    if not exchanged or _stand_together(exchanged, written):
        return None
    return "number" if exchanged[0].is_number else "name"


def _stand_together(exchanged: Sequence[Token], written: Sequence[Token]) -> bool:
    """`Employees get 25 days, trainees get 28` says both: what was put in is a clause of its own."""
    for clause in {token.clause for token in written}:
        held = forms_of(token for token in written if token.clause == clause)
        if all(token.forms & held for token in exchanged):
            return True
    return False


def _telling(tokens: Sequence[Token]) -> list[Token]:
    """Names and numbers."""
    return [
        token
        for token in tokens
        if token.is_number or (token.is_content and token.written[0].isupper() and token.lower not in _TITLES)
    ]
