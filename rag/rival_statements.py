"""Two sentences that differ in one thing and cannot both be true: opposites, names, roles.

A doubt is no contradiction: somebody else may work there too, and another gate may be closed. So all the rest must be
the same, and a name counts only beside a word for something that there is once (a head, a capital, a deadline), in the
place of what that word asks for. How often this errs is tested on labelled pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from rag.bm25 import spellings
from rag.claim_tokens import Token, forms_of
from rag.language import Language
from rag.near_copy import is_verbatim
from rag.negation import is_negation
from rag.opposites import excluded_by
from rag.roles import are_roles_changed

_LONGEST_NAME = 3
_LEAST_FOR_ROLES = 3

_LISTS = {
    "copula": "is are was were ist sind war waren est sont était è sono era es son fue heißt",
    "passive": "is are was were been wird werden wurde wurden est sont été è sono stato stata fu es son fue",
    "agent": "by von par da dal dalla por",
    "place": "in on at im am an à au en le sul nel a di il el los",
    "preposition": "in on at of for with im am für mit bei à en pour avec di per con de para",
    "definite": "the der die das den dem le la les l il lo gli i el los las",
    "auxiliary": "has had hat hatte a avait ha aveva había",
    "title": "mr mrs ms dr prof herr frau m mme sig signor signora sr sra",
    "weekday": """
        monday tuesday wednesday thursday friday saturday sunday montag dienstag mittwoch donnerstag freitag samstag
        sonntag lundi mardi mercredi jeudi vendredi samedi dimanche lunedì martedì mercoledì giovedì venerdì sabato
        domenica lunes martes miércoles jueves viernes sábado domingo
    """,
}
_WORDS = {kind: frozenset(listed.split()) for kind, listed in _LISTS.items()}
_ONE_OF_SEVERAL_LISTS: dict[Language, str] = {
    "en": "a an one another also too some",
    "de": "ein eine einen einem einer eines auch manche weitere",
    "fr": "un une des aussi également autre",
    "it": "un uno una anche altro altra",
    "es": "un una unos unas también otro otra",
}
_ONE_OF_SEVERAL = {language: frozenset(listed.split()) for language, listed in _ONE_OF_SEVERAL_LISTS.items()}
_ONE_HOLDER = """
    head contact director chief ceo chair chairman chairwoman president mayor capital founder inventor author owner
    successor predecessor winner responsible leiter leiterin direktor direktorin chef chefin vorsitzende
    vorsitzender präsident präsidentin bürgermeister bürgermeisterin hauptstadt gründer gründerin erfinder autor
    autorin eigentümer nachfolger vorgänger sieger zuständig verantwortlich ansprechpartner ansprechpartnerin
    directeur directrice président présidente maire capitale fondateur fondatrice inventeur auteur propriétaire
    responsable direttore direttrice capo presidente sindaco fondatore fondatrice inventore autore proprietario
    responsabile directora jefe jefa presidenta alcalde alcaldesa fundador fundadora propietario
"""
_ONE_DOER = """
    leads led heads headed chairs chaired founded invented discovered wrote written owns owned leitet geleitet
    leitete gründete gegründet erfand erfunden entdeckte entdeckt schrieb geschrieben besitzt dirige dirigé dirigée
    fondé fondée inventé inventée découvert découverte écrit écrite diretto diretta fondò fondato fondata inventò
    inventato scoprì scoperto scoperta scrisse scritto dirigido dirigida fundó fundado fundada inventado descubrió
    descubierto escribió escrito
"""
_ONE_PLACE_OR_TIME = """
    headquarters headquartered located seat due deadline born died begins starts ends sitz hauptsitz fällig frist
    geboren gestorben beginnt endet siège due dû échéance né née mort morte commence finit situé située sede
    scadenza scade nato nata morto morta inizia finisce situato situata vence plazo nació nacido murió empieza
    termina situado
"""
_MUTUAL = """
    borders meets met married twinned equals resembles grenzt trifft gleicht verheiratet rencontre ressemble incontra
    somiglia limita encuentra parece
"""


def exclude_each_other(said: Sequence[Token], written: Sequence[Token], language: Language | None) -> bool:
    """Whether only one of both sentences can be true of the same thing."""
    if is_verbatim(said, written) or not _have_same_numbers(said, written):
        return False
    denied = [_num_negations(tokens, language) for tokens in (said, written)]
    if _differ_by_opposites(said, written):
        return denied[0] == denied[1]
    return denied == [0, 0] and (_name_another(said, written, language) or _exchange_roles(said, written))


def _differ_by_opposites(said: Sequence[Token], written: Sequence[Token]) -> bool:
    """All words are the same but one of each, and these exclude each other."""
    here, there = _without(said, written), _without(written, said)
    if len(here) != 1 or len(there) != 1 or len(_content(said)) < 2:
        return False
    return there[0].lower in excluded_by(here[0].lower)


def _name_another(said: Sequence[Token], written: Sequence[Token], language: Language | None) -> bool:
    start = _num_common(said, written)
    tail = _num_common(said[start:][::-1], written[start:][::-1])
    here, there = _untitled(said[start : len(said) - tail]), _untitled(written[start : len(written) - tail])
    if not (_is_name(here) and _is_name(there)) or _may_be_the_same(here, there):
        return False
    if any(token.lower in _ONE_OF_SEVERAL[language or "en"] for token in said):
        return False
    return _asked_for(said, *_whole_name(said, start, len(said) - tail))


def _asked_for(said: Sequence[Token], first: int, end: int) -> bool:
    """Whether the name from `first` to `end` is the one thing of its kind."""
    before, after = said[:first], said[end:]
    if all(token.lower in _WORDS["title"] for token in before):
        return _is_the_holder(after) or _is_the_doer(after)
    if _is_the_agent(said, before[-1].lower):
        return True
    if after and after[0].is_content and not _speaks_of(after[:1], _ONE_PLACE_OR_TIME):
        return False  # the name is a part of something else: "the Anna Smith prize"
    return _is_the_answer(said, before)


def _is_the_agent(said: Sequence[Token], previous: str) -> bool:
    """`was founded by`, not `works by`."""
    is_passive = any(token.lower in _WORDS["passive"] for token in said)
    return previous in _WORDS["agent"] and is_passive and _speaks_of(said, _ONE_DOER)


def _is_the_answer(said: Sequence[Token], before: Sequence[Token]) -> bool:
    """`the capital is`, `due on`."""
    previous = before[-1].lower
    if previous in _WORDS["copula"]:
        return _speaks_of(before, _ONE_HOLDER) or _speaks_of(before, _ONE_PLACE_OR_TIME)
    return previous in _WORDS["place"] and _speaks_of(said, _ONE_PLACE_OR_TIME)


def _is_the_holder(after: Sequence[Token]) -> bool:
    """`is the new head`, not `is in the capital`."""
    if not after or after[0].lower not in _WORDS["copula"]:
        return False
    near = after[1:4]
    place = next((place for place, token in enumerate(near) if _speaks_of([token], _ONE_HOLDER)), None)
    return place is not None and not any(token.lower in _WORDS["preposition"] for token in near[:place])


def _is_the_doer(after: Sequence[Token]) -> bool:
    """`founded the firm`, not `wrote letters`."""
    if not after or not (_speaks_of(after[:1], _ONE_DOER) or after[0].lower in _WORDS["auxiliary"]):
        return False
    return _speaks_of(after, _ONE_DOER) and any(t.lower in _WORDS["definite"] or t.is_name for t in after[1:3])


def _exchange_roles(said: Sequence[Token], written: Sequence[Token]) -> bool:
    if len(_content(said)) < _LEAST_FOR_ROLES or _without(said, written) or _without(written, said):
        return False
    return not _speaks_of(said, _MUTUAL) and are_roles_changed(said, written)


def _is_name(tokens: Sequence[Token]) -> bool:
    """All of it, and not too long for one."""
    return 0 < len(tokens) <= _LONGEST_NAME and all(
        token.is_content and (token.written[0].isupper() or token.lower in _WORDS["weekday"]) for token in tokens
    )


def _untitled(tokens: Sequence[Token]) -> list[Token]:
    """`Dr Weber` may well be Anna Weber."""
    return [token for token in tokens if token.lower not in _WORDS["title"]]


def _may_be_the_same(here: Sequence[Token], there: Sequence[Token]) -> bool:
    """A name cut short, or its initials."""
    if any(token.written.isupper() for token in (*here, *there)):
        return True
    one, other = here[0].lower, there[0].lower
    return one.startswith(other) or other.startswith(one)


def _whole_name(said: Sequence[Token], first: int, end: int) -> tuple[int, int]:
    """With the first and last names that both sentences have."""
    while first and said[first - 1].is_content and said[first - 1].written[0].isupper():
        first -= 1
    while end < len(said) and said[end].is_name:
        end += 1
    return first, end


def _num_common(one: Sequence[Token], other: Sequence[Token]) -> int:
    """Tokens that are the same from the beginning on."""
    number = 0
    for first, second in zip(one, other, strict=False):
        if first.lower != second.lower:
            break
        number += 1
    return number


def _have_same_numbers(said: Sequence[Token], written: Sequence[Token]) -> bool:
    here = [token.forms for token in said if token.is_number]
    there = [token.forms for token in written if token.is_number]
    return len(here) == len(there) and all(one & other for one, other in zip(here, there, strict=True))


def _num_negations(tokens: Sequence[Token], language: Language | None) -> int:
    return sum(is_negation(tokens, index, language) for index in range(len(tokens)))


def _without(tokens: Sequence[Token], others: Sequence[Token]) -> list[Token]:
    """Content words that the others do not have."""
    held = forms_of(others)
    return [token for token in _content(tokens) if not token.forms & held]


def _content(tokens: Sequence[Token]) -> list[Token]:
    return [token for token in tokens if token.is_content]


def _speaks_of(tokens: Sequence[Token], listed: str) -> bool:
    return any(token.forms & _forms(listed) for token in tokens if token.is_content)


@cache
def _forms(listed: str) -> frozenset[str]:
    return frozenset(form for word in listed.split() for form in spellings(word))
