"""Who did what to whom: whether a sentence gives the words of a passage to somebody else.

Three signs, all of places and clauses: two words changed sides around a third; one name took the preposition of
another; a name got what stands in the clause of another name.
"""

from __future__ import annotations

from collections.abc import Sequence

from rag.claim_tokens import Token, forms_of

_AGENT = frozenset(["by", "par", "da", "dal", "dalla", "dai", "dall", "von", "vom", "por"])
"""What stands before the one who does it, in the passive."""
_RELATIVE_WORDS = """
    who which that whose he she it they der die das er sie es welche welcher qui que il elle ils elles dont lequel
    che cui egli ella lui lei quien él ella cual
"""
RELATIVE = frozenset(_RELATIVE_WORDS.split())
_PREPOSITION_LISTS = (
    "in im at on en dans nel nella nell à au aux a al alla auf an am su sul sulla to zu zum zur nach",
    "from von vom de du des del della dello da dal dalla dall aus desde d",
    "by par durch por",
    "for für pour per para",
    "with mit avec con",
    "since seit depuis during während pendant durante after before",
)
_PREPOSITIONS = {word: group for group, listed in enumerate(_PREPOSITION_LISTS) for word in listed.split()}
_REACH = 4
"""Tokens back to the preposition of a word: `von der Firma Hellwig`."""


def are_roles_changed(said: Sequence[Token], written: Sequence[Token]) -> bool:
    """`said` is a sentence, `written` the place of a passage that has nearly all of its words."""
    if _has_changed_clause(said, written):
        return True
    if _is_passive(said) != _is_passive(written):
        return False
    return _has_swapped_sides(said, written) or _has_swapped_prepositions(said, written)


def _has_swapped_sides(said: Sequence[Token], written: Sequence[Token]) -> bool:
    """A, V, B here and B, V, A there. Not what a preposition leads: `in Berlin` may stand anywhere. Nor what stands on
    both sides of the others in one of both: a clause has but one of its places."""
    clauses = [[token for token in written if token.clause == clause] for clause in {t.clause for t in written}]
    return _has_swapped_pair(said, written, only_names=True) or any(_has_swapped_pair(said, each) for each in clauses)


def _has_swapped_pair(said: Sequence[Token], clause: Sequence[Token], *, only_names: bool = False) -> bool:
    here, there = _content(said), _content(clause)
    order = [_places(token, here) for token in here]
    places = [_places(token, there) for token in here]
    bare = [not _is_governed(token, said) and (_is_big(token) or not only_names) for token in here]
    free = {place for place, token in enumerate(there) if not _is_governed(token, clause)}
    for middle in range(1, len(here) - 1):
        if not places[middle]:
            continue
        for left in range(middle):
            for right in range(middle + 1, len(here)):
                if (
                    bare[left]
                    and bare[right]
                    and places[left]
                    and places[right]
                    and free.issuperset((*places[left], *places[right]))
                    and _follow(order[left], order[middle], order[right])
                    and _follow(places[right], places[middle], places[left])
                ):
                    return True
    return False


def _follow(first: Sequence[int], second: Sequence[int], third: Sequence[int]) -> bool:
    """Whether all of these places come one after the other."""
    return max(first) < min(second) <= max(second) < min(third)


def _has_swapped_prepositions(said: Sequence[Token], written: Sequence[Token]) -> bool:
    """`X sold it to Y` here and `Y sold it to X` there."""
    names = [token for token in said if _is_big(token)]
    for led in names:
        group = _group_of(led, said)
        own = [_group_of(other, written) for other in written if other.forms & led.forms]
        if group is None or not own or any(found is not None for found in own):
            continue
        for free in names:
            theirs = [_group_of(other, written) for other in written if other.forms & free.forms]
            if _group_of(free, said) is None and theirs and all(found == group for found in theirs):
                return True
    return False


def _has_changed_clause(said: Sequence[Token], written: Sequence[Token]) -> bool:
    """`A does X, B does Y` there and `A does Y` here: A's clause says something that is left out, and what is said
    instead stands in a clause whose own name is left out."""
    forms = forms_of(said)
    for name in (token for token in said if _is_big(token)):
        own = {token.clause for token in written if token.forms & name.forms}
        if not own or not all(_leaves_out(clause, written, forms) for clause in own):
            continue
        held = forms_of(token for token in written if token.clause in own)
        for clause in {token.clause for token in written} - own:
            if _has_other_subject(clause, written, forms, held):
                return True
    return False


def _leaves_out(clause: int, written: Sequence[Token], forms: frozenset[str]) -> bool:
    return any(token.clause == clause and _counts(token) and not token.forms & forms for token in written)


def _has_other_subject(clause: int, written: Sequence[Token], forms: frozenset[str], held: frozenset[str]) -> bool:
    """A name of the clause that the sentence leaves out stands before what it takes from there, or is the agent."""
    tokens = [token for token in written if token.clause == clause]
    taken = [token for token in tokens if _counts(token) and token.forms & forms and not token.forms & held]
    if not taken or tokens[0].lower in RELATIVE:
        return False
    dropped = [token for token in tokens if _is_big(token) and not token.forms & forms]
    return any(token.place < taken[0].place or _is_agent(token, written) for token in dropped)


def _is_agent(token: Token, tokens: Sequence[Token]) -> bool:
    return any(other.lower in _AGENT for other in tokens[max(0, token.place - _REACH) : token.place])


def _is_governed(token: Token, tokens: Sequence[Token]) -> bool:
    """Led by a preposition, or counted: such words have no fixed side."""
    is_counted = any(other.is_number and other.place == token.place - 1 for other in tokens)
    return token.is_number or is_counted or _group_of(token, tokens) is not None


def _group_of(token: Token, tokens: Sequence[Token]) -> int | None:
    """The kind of the preposition before a word, its articles, titles and first names in between."""
    before = [other for other in tokens if token.place - _REACH <= other.place < token.place]
    for index in range(len(before) - 1, -1, -1):
        other = before[index]
        if other.lower in _PREPOSITIONS and not (index and _is_kind(before[index - 1])):
            return _PREPOSITIONS[other.lower]
        if other.clause != token.clause or (
            other.is_content and not other.written[0].isupper() and not _is_kind(other)
        ):
            return None
    return None


def _is_kind(token: Token) -> bool:
    """What a name belongs to: `la familia Molina`."""
    return token.lower in ("familia", "famille", "famiglia", "family", "company", "société", "empresa", "ville", "city")


def _is_big(token: Token) -> bool:
    return token.is_content and token.written[0].isupper()


def _is_passive(tokens: Sequence[Token]) -> bool:
    """Somebody is named as the agent: not a measure, as in `sank by 9 metres`."""
    for index, token in enumerate(tokens):
        if token.lower in _AGENT:
            following = next((other for other in tokens[index + 1 : index + 1 + _REACH] if _counts(other)), None)
            if following is not None and not following.is_number:
                return True
    return False


def _counts(token: Token) -> bool:
    return token.is_content or token.is_number


def _content(tokens: Sequence[Token]) -> list[Token]:
    return [token for token in tokens if _counts(token)]


def _places(token: Token, others: Sequence[Token]) -> list[int]:
    return [place for place, other in enumerate(others) if token.forms & other.forms]
