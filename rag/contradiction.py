"""Documents that contradict what an answer took from another one: both are cited.

A passage of another document contradicts a cited sentence where one of its sentences has nearly all words of the cited
one, both ways, and objects to a number, a unit or a denial; or where both are the same but for one thing and cannot
both be true (`rag.rival_statements`). What it says is added to the answer as a quote.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from rag.citations import CitedAnswer, CitedPassage, make_citation
from rag.claim_tokens import Token, forms_of, read_tokens
from rag.language import Language, detect_language
from rag.quantities import UNITS
from rag.rival_statements import exclude_each_other
from rag.sentences import Span
from rag.support import ReadPassage, ReadSentence, judge, share
from rag.types import Passage

_ALIKE = 0.75
"""Share of the words, numbers left out, that both sentences must have in common."""
_LEAST_WORDS = 2

_OTHERWISE: dict[Language, str] = {
    "en": "Another document says otherwise",
    "fr": "Un autre document dit autre chose",
    "it": "Un altro documento dice altro",
    "de": "Ein anderes Dokument sagt etwas anderes",
    "es": "Otro documento dice otra cosa",
}


@dataclass(frozen=True, slots=True)
class Contradiction:
    """`passages[number - 1].chunk.text[quote.start:quote.end]` says something else than a cited sentence."""

    number: int
    quote: Span


def find_contradictions(
    cited: CitedAnswer, passages: Sequence[Passage], unusable: Collection[int] = ()
) -> list[Contradiction]:
    """At most one for each passage, in the order of the passages. Only documents that the answer does not cite."""
    sources = {each.citation.document_id for each in cited.citations}
    others = [
        (number, ReadPassage(passage))
        for number, passage in enumerate(passages, start=1)
        if passage.chunk.document_id not in sources and number not in unusable
    ]
    found = (_contradiction(number, passage, cited) for number, passage in others)
    return [each for each in found if each is not None]


def with_contradictions(
    cited: CitedAnswer,
    question: str,
    passages: Sequence[Passage],
    collection_names: Mapping[str, str],
    unusable: Collection[int] = (),
) -> CitedAnswer:
    """The answer with a quote of each contradicting passage behind it, cited too."""
    lead_in = _OTHERWISE[detect_language(question) or "en"]
    for each in find_contradictions(cited, passages, unusable):
        passage = passages[each.number - 1]
        quote = " ".join(passage.chunk.text[each.quote.start : each.quote.end].split())
        sentence = f"{lead_in}: “{quote}” [{each.number}]"
        start = len(cited.text) + 2
        citation = make_citation(each.number, passage, each.quote.start, each.quote.end, collection_names)
        added = CitedPassage(citation, ((start, start + len(sentence)),))
        cited = replace(cited, text=f"{cited.text}\n\n{sentence}", citations=(*cited.citations, added))
    return cited


def _contradiction(number: int, passage: ReadPassage, cited: CitedAnswer) -> Contradiction | None:
    for each in cited.citations:
        for start, end in each.answer_spans:
            sentence = ReadSentence(_without_mark(cited.text[start:end], each.citation.number))
            if quote := contradicting_quote(sentence, passage):
                return Contradiction(number, quote)
    return None


def contradicting_quote(sentence: ReadSentence, passage: ReadPassage) -> Span | None:
    """Where the passage says something else."""
    sentence = sentence.read_as(passage.language)
    verdict = judge(sentence, passage)
    if verdict.objection in ("number", "unit", "negation") and _is_alike(sentence.tokens, passage, verdict.quote):
        quoted = read_tokens(passage.text[verdict.quote.start : verdict.quote.end], passage.language)
        if verdict.objection != "number" or _has_another_number(sentence.tokens, quoted):
            return verdict.quote
    rivals = [exclude_each_other(sentence.tokens, tokens, passage.language) for tokens in passage.tokens]
    is_said = any(
        share(_content(sentence.tokens), forms) == 1.0 and not is_rival
        for forms, is_rival in zip(passage.forms, rivals, strict=True)
    )
    if is_said or True not in rivals:
        return None
    return passage.sentences[rivals.index(True)]


def _has_another_number(said: Sequence[Token], quoted: Sequence[Token]) -> bool:
    """A quote without one only says less."""
    own = forms_of(token for token in said if token.is_number)
    return any(token.is_number and not token.forms & own for token in quoted)


def _is_alike(tokens: Sequence[Token], passage: ReadPassage, quote: Span) -> bool:
    own = _content(tokens)
    theirs = _content(read_tokens(passage.text[quote.start : quote.end], passage.language))
    if len(own) < _LEAST_WORDS:
        return False
    said, written = share(own, _union(theirs) | passage.heading_forms), share(theirs, _union(own))
    # Where each has a word that the other lacks, they may speak of two things: what members pay, and what guests pay.
    return min(said, written) >= _ALIKE and max(said, written) == 1.0


def _content(tokens: Sequence[Token]) -> list[frozenset[str]]:
    """Words but those for units, which are compared with their numbers."""
    return [token.forms for token in tokens if token.is_content and token.lower not in UNITS]


def _union(forms: Sequence[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*forms)


def _without_mark(sentence: str, number: int) -> str:
    return sentence.replace(f" [{number}]", "")
