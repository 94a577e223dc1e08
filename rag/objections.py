"""What in a passage speaks against a sentence although its words stand there: other numbers, units, names, denials,
opposites, or somebody else in the role.

Each check is a function of the tokens of the sentence and of the window (the up to three sentences of the passage that
hold most of it). They look at places and clauses, not at grammar; how often they err is measured (see BENCHMARKS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rag.claim_tokens import Token, forms_of, join_sentences
from rag.language import Language
from rag.near_copy import exchanged_in_copy, is_verbatim
from rag.negation import denied_words, is_negation
from rag.opposites import opposites_of
from rag.quantities import DIMENSIONS, RATE_WORDS, UNITS
from rag.roles import RELATIVE, are_roles_changed

Objection = Literal["words", "number", "unit", "name", "negation", "opposite", "role"]
"""Why a passage does not support a sentence: it says too little of it, or something else instead."""

_NEAR = 10
"""Tokens within which a number stands beside what it counts."""
_COUNTED_WITHIN = 4
_SHORT_NAME = 4
"""Names up to this length are found as names alone: May is not `may`."""
_TITLES = frozenset(["herr", "herrn", "frau", "dr", "prof", "firma", "stadt", "familie"])
_BARE_PREPOSITIONS = frozenset(["in", "aus", "nach", "von", "bei", "für", "mit", "gegen"])
_PRONOUN_LISTS: dict[Language, str] = {
    "en": "he she it they his her its their him them this these who which",
    "de": "er sie es sein seine seinen ihr ihre ihren ihn ihm dieser diese dieses der die das",
    "fr": "il elle ils elles son sa ses leur leurs lui celui celle ce cette ces qui",
    "it": "egli ella esso essa essi lui lei loro suo sua suoi sue questo questa che",
    "es": "él ella ellos ellas su sus este esta estos estas que",
}
_PRONOUNS = {language: frozenset(listed.split()) for language, listed in _PRONOUN_LISTS.items()}
_SUBJECT_CAN_BE_LEFT_OUT = ("it", "es")


class Window:
    """Sentences of a passage as one run of tokens, the words of the headings above it, and the sentences before it."""

    def __init__(
        self, sentences: Sequence[Sequence[Token]], heading_forms: frozenset[str], before: Sequence[Sequence[Token]]
    ) -> None:
        self.sentences = sentences
        self.tokens = join_sentences(sentences)
        self.heading_forms = heading_forms
        self.before = [token for tokens in before for token in tokens]
        self.forms = forms_of(self.tokens)


def find_objection(
    sentence: Sequence[Token],
    window: Window,
    language: Language | None,
    passage_language: Language | None,
    known_names: frozenset[str],
    *,
    compare_roles: bool,
) -> Objection | None:
    """The first that speaks against the sentence. `known_names` are the names of the whole passage."""
    if any(is_verbatim(sentence, tokens) for tokens in window.sentences):
        return _object_to_denials(sentence, window.tokens, language or passage_language, passage_language)
    return (
        next((found for tokens in window.sentences if (found := exchanged_in_copy(sentence, tokens))), None)
        or _object_to_numbers(sentence, window)
        or _object_to_units(sentence, window)
        or _object_to_names(sentence, window, language, passage_language, known_names)
        or _object_to_denials(sentence, window.tokens, language or passage_language, passage_language)
        or _object_to_opposites(sentence, window)
        or ("role" if compare_roles and are_roles_changed(sentence, window.tokens) else None)
    )


def _object_to_numbers(sentence: Sequence[Token], window: Window) -> Objection | None:
    for number in (token for token in sentence if token.is_number):
        found = [token for token in window.tokens if token.is_number and token.forms & number.forms]
        if not found:
            if number.forms & window.heading_forms:
                continue
            return "number"
        same_unit = [token for token in found if number.unit is None or token.unit in (number.unit, None)]
        if not same_unit:
            return "unit"
        if not _stands_beside_its_words(number, sentence, same_unit, window.tokens):
            return "number"
        if all(_belongs_to_other_words(token, sentence, window.tokens) for token in same_unit):
            return "number"
    return None


def _stands_beside_its_words(
    number: Token, sentence: Sequence[Token], found: Sequence[Token], window: Sequence[Token]
) -> bool:
    """The words around a number of the sentence must stand around it in the passage too, as far as they are there; and
    what it counts must not be counted by another number."""
    held = forms_of(window)
    around = [token for token in _content_around(sentence, number.place) if token.forms & held]
    places = [token.place for token in found]
    if around and not any(_is_near(token, places, window) for token in around):
        return False
    counted = next((token for token in sentence[number.place + 1 : number.place + 3] if token.is_content), None)
    if (
        counted is None
        or number.unit is not None
        or any(_is_part_of_others(token, sentence, window) for token in found)
    ):
        return True
    occurrences = [token for token in window if token.forms & counted.forms]
    own = any(_counts(token, other, window) for token in found for other in occurrences)
    others = [token for token in window if token.is_number and token.place not in places]
    return own or not any(_counts(token, other, window) for token in others for other in occurrences)


def _is_part_of_others(number: Token, sentence: Sequence[Token], window: Sequence[Token]) -> bool:
    """`84 species, of which three`: counts what another number counts, unless it has a word of its own."""
    following = window[number.place + 1 : number.place + 2]
    if any(token.is_content and not token.forms & forms_of(sentence) for token in following):
        return False
    first = next(token for token in window if token.clause == number.clause)
    return first.lower in RELATIVE or first.lower in ("of", "dont", "davon", "darunter", "di")


def _is_near(token: Token, places: Sequence[int], window: Sequence[Token]) -> bool:
    return any(abs(other.place - place) <= _NEAR for other in window if other.forms & token.forms for place in places)


def _counts(number: Token, word: Token, window: Sequence[Token]) -> bool:
    """The word follows the number closely, no other number in between."""
    if not 0 < word.place - number.place <= _COUNTED_WITHIN:
        return False
    return not any(token.is_number for token in window[number.place + 1 : word.place])


def _content_around(tokens: Sequence[Token], place: int) -> list[Token]:
    """Up to two content words on each side, not further numbers."""
    before = [token for token in tokens[:place] if token.is_content][-2:]
    after = [token for token in tokens[place + 1 :] if token.is_content][:2]
    return before + after


def _belongs_to_other_words(number: Token, sentence: Sequence[Token], window: Sequence[Token]) -> bool:
    """`Employees get 25 days, trainees 28`: the sentence takes a word from a clause that has another number of the same
    kind, and leaves out a word before its own number. (A later clause may borrow what an earlier one says.)"""
    said = forms_of(sentence)
    clause = [token for token in window if token.clause == number.clause]
    before = [token for token in clause if token.place < number.place and token.lower not in RELATIVE]
    leaves_out = any(token.is_content and not token.forms & said for token in before)
    held = forms_of(clause)
    for other in window:
        if not other.is_number or other.clause == number.clause or other.forms & said:
            continue
        if other.unit is not None and number.unit is not None and other.unit != number.unit:
            continue
        if not leaves_out and not (other.place > number.place and other.unit == number.unit is not None):
            continue
        theirs = [token for token in window if token.clause == other.clause and token.is_content]
        if any(token.forms & said and not token.forms & held for token in theirs) and _shares_a_sentence(
            number, other, window
        ):
            return True
    return False


def _shares_a_sentence(first: Token, second: Token, window: Sequence[Token]) -> bool:
    """Clauses that follow each other."""
    return abs(first.clause - second.clause) == 1 and abs(first.place - second.place) <= 2 * _NEAR


def _object_to_units(sentence: Sequence[Token], window: Window) -> Objection | None:
    """`per day` where the passage says `per hour`."""
    there = {unit for token in window.tokens if (unit := _unit_of(token))}
    for token in sentence:
        unit = UNITS.get(token.lower)
        if unit is None or unit in there or token.forms & (window.forms | window.heading_forms):
            continue
        if any(unit in DIMENSIONS and DIMENSIONS.get(other) == DIMENSIONS[unit] for other in there):
            return "unit"
    return None


def _unit_of(token: Token) -> str | None:
    return UNITS.get(token.lower) or RATE_WORDS.get(token.lower)


def _object_to_names(
    sentence: Sequence[Token],
    window: Window,
    language: Language | None,
    passage_language: Language | None,
    known_names: frozenset[str],
) -> Objection | None:
    """Each name must stand in the window or the headings; one that a pronoun stands for, shortly before."""
    before = window.before if _has_pronoun(window.tokens, passage_language) else []
    for index, token in enumerate(sentence):
        if not _is_name(sentence, index, language, known_names) or token.forms & window.heading_forms:
            continue
        if not any(_is_same_name(token, other) for other in (*window.tokens, *before)):
            return "name"
    return None


def _is_name(sentence: Sequence[Token], index: int, language: Language | None, known: frozenset[str]) -> bool:
    """The first word of a sentence is one where the passage knows it as a name. Every noun of German is written with a
    capital, so there a name needs a title, another name or a bare preposition before it."""
    token = sentence[index]
    if not token.is_content or not token.written[0].isupper():
        return False
    if language != "de":
        return token.is_name or bool(token.forms & known)
    previous = sentence[index - 1] if index else None
    if previous is None:
        return False
    return previous.lower in _TITLES or previous.is_name or previous.lower in _BARE_PREPOSITIONS


def _is_same_name(token: Token, other: Token) -> bool:
    if not token.forms & other.forms:
        return False
    return len(token.written) > _SHORT_NAME or other.written[0].isupper()


def _has_pronoun(window: Sequence[Token], language: Language | None) -> bool:
    if language in _SUBJECT_CAN_BE_LEFT_OUT:
        return True
    return any(token.lower in _PRONOUNS[language or "en"] for token in window)


def _object_to_denials(
    sentence: Sequence[Token], window: Sequence[Token], language: Language | None, passage_language: Language | None
) -> Objection | None:
    """What one of both denies, the other must deny too, where both speak of it."""
    denied_here = denied_words(sentence, language)
    denied_there = denied_words(window, passage_language)
    held, said = forms_of(window), forms_of(sentence)
    there, here = _all_forms(denied_there), _all_forms(denied_here)
    if any(not forms_of(words) & there and forms_of(words) & held for words in denied_here):
        return "negation"
    for words in denied_there:
        relevant = [word for word in words if word.forms & said]
        if relevant and not forms_of(words) & here and not any(_is_also_said(word, words, window) for word in relevant):
            return "negation"
    has_cue = any(is_negation(window, index, passage_language) for index in range(len(window)))
    return "negation" if denied_here and not has_cue else None


def _all_forms(words: Sequence[Sequence[Token]]) -> frozenset[str]:
    return frozenset().union(*map(forms_of, words))


def _is_also_said(token: Token, denied: Sequence[Token], window: Sequence[Token]) -> bool:
    """The word that the window denies also stands in it without being denied."""
    places = {other.place for other in denied}
    return any(other.place not in places and other.forms & token.forms for other in window)


def _object_to_opposites(sentence: Sequence[Token], window: Window) -> Objection | None:
    held = window.forms | window.heading_forms
    there = {token.lower for token in window.tokens}
    for token in sentence:
        if not token.forms & held and opposites_of(token.lower) & there:
            return "opposite"
    return None
