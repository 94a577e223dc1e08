"""Whether the passages that were found are evidence for an answer at all, and what is said when they are not.

The score of a passage is its cosine, plus a little for each word that it shares with the question, plus an allowance
where both are in different languages. E5 cosines lie between 0.7 and 0.95, whatever is asked, so weights and threshold
are measured ones; `windfarm tune` fits the threshold to a collection's own questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rag.bm25 import spellings
from rag.language import Language, content_words, detect_language, words
from rag.types import Passage

DEFAULT_THRESHOLD = 0.855
"""Measured on questions in five languages (BENCHMARKS.md)."""

WORDS_WEIGHT = 0.08
"""What all content words of the question in one passage are worth, in cosine."""
_LANGUAGE_ALLOWANCE = 0.06

_NO_EVIDENCE: dict[Language, str] = {
    "en": "I could not find an answer to this in the chosen documents.",
    "fr": "Je n'ai pas trouvé de réponse à cette question dans les documents choisis.",
    "it": "Non ho trovato una risposta a questa domanda nei documenti scelti.",
    "de": "In den gewählten Dokumenten habe ich dazu keine Antwort gefunden.",
    "es": "No he encontrado una respuesta a esta pregunta en los documentos elegidos.",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """`score` is the best passage's, on the scale of cosines; `threshold` what was asked for."""

    is_found: bool
    score: float
    threshold: float


def judge_evidence(
    question: str,
    passages: Sequence[Passage],
    threshold: float = DEFAULT_THRESHOLD,
    own_thresholds: Mapping[str, float] | None = None,
) -> Evidence:
    """Is at least one passage near enough to the question? `own_thresholds` are those of tuned collections, by the id
    that their passages carry."""
    own = own_thresholds or {}
    judged = [
        (score_evidence(question, [passage]), own.get(passage.chunk.collection_id, threshold)) for passage in passages
    ]
    score, needed = max(judged, key=lambda pair: pair[0] - pair[1], default=(-1.0, threshold))
    return Evidence(score >= needed, score, needed)


def score_evidence(question: str, passages: Sequence[Passage]) -> float:
    """The highest threshold at which the passages still are evidence: the best cosine with its allowances. -1 where
    nothing was found by meaning."""
    return max((_score_one(question, passage) for passage in passages), default=-1.0)


def _score_one(question: str, passage: Passage) -> float:
    cosine = passage.leg_scores.get("dense", -1.0)
    if cosine <= -1.0:
        return -1.0
    asked_in, written_in = detect_language(question), passage.chunk.language
    is_foreign = asked_in is not None and written_in is not None and asked_in != written_in
    return cosine + WORDS_WEIGHT * shared_words(question, passage) + (_LANGUAGE_ALLOWANCE if is_foreign else 0.0)


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
