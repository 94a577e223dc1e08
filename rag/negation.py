"""What a text denies: words of negation in five languages, and the word that each of them is about.

The word that is denied is the first content word after the negation in the same clause, else one of those before it
(German puts `nicht` at the end). Double negatives of one clause (`ne ... pas`, `non ... mai`) count once.
"""

from __future__ import annotations

from collections.abc import Sequence

from rag.claim_tokens import Token
from rag.language import Language

_CUE_LISTS: dict[Language, str] = {
    "en": "not no never none neither nor cannot without nobody nothing t",
    "de": "nicht kein keine keinen keinem keiner keines nie niemals ohne weder noch niemand nichts",
    "fr": "ne n pas jamais aucun aucune sans ni rien personne",
    "it": "non mai nessun nessuno nessuna senza né nulla niente",
    "es": "no nunca jamás ningún ninguno ninguna sin ni nada nadie tampoco",
}
CUES = {language: frozenset(listed.split()) for language, listed in _CUE_LISTS.items()}
_NOT_ONLY = frozenset(["only", "just", "nur", "seulement", "solo", "sólo", "soltanto", "bloß"])
_DOUBLE = ("fr", "it", "es")
_SPAN = 4
"""Tokens within which two negations are one."""
_REACH = 6
"""Tokens after a negation among which the denied word is looked for."""


def is_negation(tokens: Sequence[Token], index: int, language: Language | None) -> bool:
    """`t` is what the tokens keep of `don't`; `not only` denies nothing."""
    word = tokens[index].lower
    if word not in CUES[language or "en"]:
        return False
    if word == "t" and not (index and tokens[index - 1].lower.endswith("n")):
        return False
    return not (index + 1 < len(tokens) and tokens[index + 1].lower in _NOT_ONLY)


def denied_words(tokens: Sequence[Token], language: Language | None) -> list[list[Token]]:
    """For each negation the words of which it denies one."""
    found: list[list[Token]] = []
    for index in range(len(tokens)):
        if is_negation(tokens, index, language) and not _completes_another(tokens, index, language):
            denied = _denied_by(tokens, index, language)
            if denied:
                found.append(denied)
    return found


def _completes_another(tokens: Sequence[Token], index: int, language: Language | None) -> bool:
    """The second half of `ne ... pas`."""
    if language not in _DOUBLE:
        return False
    before = range(max(0, index - _SPAN), index)
    same = (each for each in before if tokens[each].clause == tokens[index].clause)
    return any(is_negation(tokens, each, language) for each in same)


def _denied_by(tokens: Sequence[Token], index: int, language: Language | None) -> list[Token]:
    cue = tokens[index]
    cues = CUES[language or "en"]

    def can_be_denied(token: Token) -> bool:
        return token.clause == cue.clause and token.lower not in cues and (token.is_content or token.is_number)

    after = next((token for token in tokens[index + 1 : index + 1 + _REACH] if can_be_denied(token)), None)
    return [after] if after is not None else [token for token in tokens[:index] if can_be_denied(token)]
