"""Whether the passages that were found are evidence for an answer at all, and what is said when they are not.

E5 cosines lie between 0.7 and 0.95, whatever is asked, so the threshold is a measured one. Common words of question and
passages make up for a little missing cosine, and a question in another language than the passage gets more allowance,
because its cosine is lower by nature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rag.bm25 import spellings
from rag.language import Language, content_words, detect_language, words
from rag.types import Passage

DEFAULT_THRESHOLD = 0.83
"""Measured on questions in five languages (BENCHMARKS.md): 2 % of those that the text answers are refused, 86 % of
those whose article was taken away."""

_WORDS_ALLOWANCE = 0.02
_SUPPORTING_WORDS = 0.4
_LANGUAGE_ALLOWANCE = 0.03

_NO_EVIDENCE: dict[Language, str] = {
    "en": "I could not find an answer to this in the chosen documents.",
    "fr": "Je n'ai pas trouvé de réponse à cette question dans les documents choisis.",
    "it": "Non ho trovato una risposta a questa domanda nei documenti scelti.",
    "de": "In den gewählten Dokumenten habe ich dazu keine Antwort gefunden.",
    "es": "No he encontrado una respuesta a esta pregunta en los documentos elegidos.",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """`cosine` is the best passage's, `shared_words` the largest share of the question's words in one passage,
    `needed` the cosine that was asked for."""

    is_found: bool
    cosine: float
    shared_words: float
    needed: float


def judge_evidence(question: str, passages: Sequence[Passage], threshold: float = DEFAULT_THRESHOLD) -> Evidence:
    """Is at least one passage near enough to the question?"""
    if not passages:
        return Evidence(False, -1.0, 0.0, threshold)
    judged = [_judge_one(question, passage, threshold) for passage in passages]
    return max(judged, key=lambda evidence: (evidence.is_found, evidence.cosine - evidence.needed))


def _judge_one(question: str, passage: Passage, threshold: float) -> Evidence:
    cosine = passage.leg_scores.get("dense", -1.0)
    shared = shared_words(question, passage)
    asked_in, written_in = detect_language(question), passage.chunk.language
    needed = threshold
    if asked_in is not None and written_in is not None and asked_in != written_in:
        needed -= _LANGUAGE_ALLOWANCE
    elif shared >= _SUPPORTING_WORDS:
        needed -= _WORDS_ALLOWANCE
    return Evidence(cosine >= needed, cosine, shared, needed)


def shared_words(question: str, passage: Passage) -> float:
    """Share of the question's content words that stand in the passage or its headings, inflected or not."""
    wanted = [spellings(word) for word in content_words(question)]
    if not wanted:
        return 0.0
    text = "\n".join((passage.chunk.title or "", *passage.chunk.headings, passage.chunk.text))
    held = {form for word in words(text) for form in spellings(word)}
    return sum(bool(forms & held) for forms in wanted) / len(wanted)


def no_evidence_answer(question: str) -> str:
    """Says in the question's language that the documents do not tell."""
    return _NO_EVIDENCE[detect_language(question) or "en"]
