"""BM25 as sparse vectors: documents carry saturated term frequencies, queries ask for words, the store multiplies by
inverse document frequency. Formula and constants are those of Lucene's BM25Similarity (Robertson and Zaragoza, "The
Probabilistic Relevance Framework: BM25 and Beyond", 2009). The average length is a constant, because stored weights
cannot change with every new document; passages of one chunker are of one size. Measured in six sets in five languages,
passages of 200 tokens keep 56 to 66 words on average when stop words are gone.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rag.language import LANGUAGES, STOP_WORDS, Language, detect_language, stem, words

K1 = 1.2
B = 0.75
AVERAGE_LENGTH = 60.0
MAX_WORD_LENGTH = 64


@dataclass(frozen=True, slots=True)
class SparseVector:
    """Word numbers, ascending and unique, with their weights."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


def encode_document(text: str, language: str | None) -> SparseVector:
    """Weights of a text to store. An unknown language is stored without stemming and stop words."""
    terms = list(_terms(text, known_language(language)))
    norm = K1 * (1.0 - B + B * len(terms) / AVERAGE_LENGTH)
    return _to_vector({term: (K1 + 1.0) * count / (count + norm) for term, count in Counter(terms).items()})


def encode_query(text: str) -> SparseVector:
    """One per word. A question may be asked in another language than the document was stemmed in, so a word is looked
    up by its stems in all languages; a spelling that no document has weighs nothing."""
    own = detect_language(text)
    stop_words = STOP_WORDS[own] if own else frozenset[str]()
    kept = [word for word in words(text) if word not in stop_words] or list(words(text))
    return _to_vector({term: 1.0 for word in kept for term in spellings(word)})


def spellings(word: str) -> set[str]:
    """The forms under which a word may have been stored: itself and its stem in each language."""
    cut = word[:MAX_WORD_LENGTH]
    return {cut} | {stem(cut, language) for language in LANGUAGES}


def known_language(language: str | None) -> Language | None:
    return next((known for known in LANGUAGES if known == language), None)


def _terms(text: str, language: Language | None) -> Iterable[str]:
    if language is None:
        return (word[:MAX_WORD_LENGTH] for word in words(text))
    stop_words = STOP_WORDS[language]
    return (stem(word[:MAX_WORD_LENGTH], language) for word in words(text) if word not in stop_words)


def _to_vector(weights: dict[str, float]) -> SparseVector:
    by_index: dict[int, float] = {}
    for term, weight in weights.items():
        index = zlib.crc32(term.encode())
        by_index[index] = max(weight, by_index.get(index, 0.0))
    ordered = sorted(by_index.items())
    return SparseVector(tuple(index for index, _ in ordered), tuple(weight for _, weight in ordered))
