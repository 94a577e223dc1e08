"""Finds the sentence of the found passages that says most about a question, for answers that no passage confirms.

Words choose a few candidates, meaning (cosines, where given) decides among them. Nothing is written here: what comes
out is a place in a passage, to be quoted letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rag.bm25 import spellings
from rag.language import Language, content_words, detect_language, words
from rag.sentences import Span, split_sentences
from rag.types import Passage

MAX_CANDIDATES = 12
_MIN_WORDS = 4
_WORDS_WEIGHT = 0.1
"""What all words of the question are worth beside a cosine; E5 cosines of related sentences differ by about that."""
_RANK_WEIGHT = 0.02
_MARKUP = re.compile(r"\s*(#|\||```|---|[\w-]+:\s|\[[^\]\n]*\]:)")
_ADDRESS = re.compile(r"https?://\S+")

_LEAD_IN: dict[Language, str] = {
    "en": "The documents say",
    "fr": "Les documents disent",
    "it": "I documenti dicono",
    "de": "In den Dokumenten steht",
    "es": "Los documentos dicen",
}


@dataclass(frozen=True, slots=True)
class Quote:
    """`passages[number - 1].chunk.text[span.start:span.end]`, with the share of the question's words in it."""

    number: int
    span: Span
    text: str
    shared_words: float


def list_quotes(question: str, passages: Sequence[Passage]) -> list[Quote]:
    """Sentences worth quoting, at most `MAX_CANDIDATES`, the most promising by words and rank first."""
    wanted = [spellings(word) for word in content_words(question)]
    found = [
        Quote(number, span, sentence, _share(wanted, sentence))
        for number, passage in enumerate(passages, start=1)
        for span in split_sentences(passage.chunk.text)
        if _is_quotable(sentence := passage.chunk.text[span.start : span.end])
    ]
    return sorted(found, key=_value, reverse=True)[:MAX_CANDIDATES]


def choose_quote(quotes: Sequence[Quote], cosines: npt.NDArray[np.float32] | None = None) -> Quote | None:
    """The best of `quotes`; `cosines` has one entry for each, its nearness to the question."""
    if not quotes:
        return None
    nearness = np.zeros(len(quotes)) if cosines is None else cosines
    best = max(range(len(quotes)), key=lambda index: float(nearness[index]) + _value(quotes[index]))
    return quotes[best]


def introduce(question: str, quote: Quote) -> str:
    """The quote as a sentence in the question's language, with its citation mark."""
    lead_in = _LEAD_IN[detect_language(question) or "en"]
    return f"{lead_in}: “{' '.join(quote.text.split())}” [{quote.number}]"


def _value(quote: Quote) -> float:
    return _WORDS_WEIGHT * quote.shared_words - _RANK_WEIGHT * (quote.number - 1)


def _is_quotable(sentence: str) -> bool:
    """Not a heading, a list of links and the like."""
    said = _ADDRESS.sub("", sentence)
    return not _MARKUP.match(sentence) and 2 * len(said) > len(sentence) and len(list(words(said))) >= _MIN_WORDS


def _share(wanted: Sequence[set[str]], sentence: str) -> float:
    held = {form for word in words(sentence) for form in spellings(word)}
    return sum(bool(forms & held) for forms in wanted) / len(wanted) if wanted else 0.0
