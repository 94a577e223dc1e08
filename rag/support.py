"""Whether a passage says what a sentence says: the measure behind citations and marks of unsupported sentences.

Words find the place: the run of up to three sentences of the passage that holds most of the sentence. What stands there
must then not object: every number with its unit and beside the words that it counts, every name, the same denials, and
nobody in the other's role. Words decide. Meaning (a cosine, where given) has a say only where sentence and passage are
in different languages: within one, praise of a passage's subject is as near to it as what the passage says. How often
this is right is measured on labelled pairs (see BENCHMARKS.md). Nothing here asks a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rag.bm25 import known_language
from rag.claim_tokens import Token, forms_of, read_tokens
from rag.language import Language, detect_language
from rag.objections import Objection, Window, find_objection
from rag.sentences import Span, split_sentences
from rag.types import Passage

SUPPORTED = 0.68
"""Share of a sentence's content words that must stand close together. Two of three do no more than name a subject."""
SUPPORTED_IN_TRANSLATION = 0.35
"""The same (names and numbers, then) where the languages differ and the meaning is the same."""
SAME_MEANING = 0.88
"""Cosine of the sentence and the nearest sentence of the passage, by multilingual-e5-small."""
_ROLES_FROM = 0.75
"""Who did what is compared where this share of the words is the same: a paraphrase may turn its order round."""
_MAX_WINDOW = 3
_WINDOW_COST = 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """`quote` is the place in the passage's text that says most of the sentence, `overlap` the share of its words
    there. `objection` is None where the passage supports the sentence."""

    objection: Objection | None
    overlap: float
    quote: Span

    @property
    def is_supported(self) -> bool:
        return self.objection is None


class ReadPassage:
    """A passage cut into sentences of tokens, read once for all sentences of an answer."""

    def __init__(self, passage: Passage) -> None:
        self.text = passage.chunk.text
        self.language = language_of(passage)
        self.sentences = split_sentences(self.text)
        self.tokens = [read_tokens(self.text[span.start : span.end], self.language) for span in self.sentences]
        self.forms = [forms_of(tokens) for tokens in self.tokens]
        headings = [*passage.chunk.headings, passage.chunk.title or "", passage.chunk.table_header or ""]
        self.heading_forms = forms_of([token for heading in headings for token in read_tokens(heading, self.language)])
        self.all_forms = self.heading_forms.union(*self.forms)
        self.name_forms = forms_of([token for tokens in self.tokens for token in tokens if token.is_name])

    def windows(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of every run of at most three sentences."""
        for first in range(len(self.sentences)):
            for last in range(first, min(first + _MAX_WINDOW, len(self.sentences))):
                yield first, last + 1

    def best_window(self, wanted: Sequence[frozenset[str]]) -> tuple[int, int]:
        """The run that holds the most wanted words with the fewest sentences."""
        best, best_value = (0, 0), -1.0
        for first, end in self.windows():
            held = frozenset().union(*self.forms[first:end])
            value = share(wanted, held) - _WINDOW_COST * (end - first - 1)
            if value > best_value + 1e-9:
                best, best_value = (first, end), value
        return best

    def quote(self, first: int, end: int) -> Span:
        return Span(self.sentences[first].start, self.sentences[end - 1].end) if end > first else Span(0, 0)


class ReadSentence:
    """A sentence of an answer as it is compared. `asked` are content words of the question, for answers of a word."""

    def __init__(self, text: str, question: str = "", language: Language | None = None) -> None:
        self.text = text
        self.question = question
        self.language = detect_language(text) or language
        self.tokens = read_tokens(text, self.language)
        self.wanted = _wanted(self.tokens)
        self.asked = _wanted(read_tokens(question)) if question else []

    def read_as(self, language: Language | None) -> ReadSentence:
        """A sentence too short to tell its language is taken to be in the passage's."""
        return self if self.language or language is None else ReadSentence(self.text, self.question, language)


def judge(sentence: ReadSentence, passage: ReadPassage, *, cosine: float = 0.0, is_marked: bool = False) -> Verdict:
    """Does the passage say it? `cosine`: with the nearest sentence of the passage. `is_marked`: the model itself cited
    this passage, and may have drawn on all of it."""
    sentence = sentence.read_as(passage.language)
    looked_for = sentence.wanted + sentence.asked if len(sentence.wanted) < 3 else sentence.wanted
    first, end = passage.best_window(looked_for)
    quote = passage.quote(first, end)
    held = passage.heading_forms.union(*passage.forms[first:end])
    overlap = share(sentence.wanted, held)
    window = Window(passage.tokens[first:end], passage.heading_forms, passage.tokens[max(0, first - 2) : first])
    is_alike = overlap >= _ROLES_FROM
    objection = find_objection(
        sentence.tokens, window, sentence.language, passage.language, passage.name_forms, compare_roles=is_alike
    )
    said = share(sentence.wanted, passage.all_forms) if is_marked else overlap
    is_translated = None not in (sentence.language, passage.language) and sentence.language != passage.language
    if objection is None and not _says_enough(said, len(sentence.wanted), cosine if is_translated else 0.0):
        objection = "words"
    return Verdict(objection, overlap, quote)


def language_of(passage: Passage) -> Language | None:
    return detect_language(passage.chunk.text) or known_language(passage.chunk.language)


def share(wanted: Sequence[frozenset[str]], held: frozenset[str]) -> float:
    """Share of the wanted words that are held in one of their spellings."""
    return sum(bool(forms & held) for forms in wanted) / len(wanted) if wanted else 0.0


def _says_enough(overlap: float, num_words: int, cosine: float) -> bool:
    if num_words < 3:
        return overlap >= 1.0
    return overlap >= SUPPORTED or (overlap >= SUPPORTED_IN_TRANSLATION and cosine >= SAME_MEANING)


def _wanted(tokens: Sequence[Token]) -> list[frozenset[str]]:
    return [token.forms for token in tokens if token.is_content or token.is_number]
