"""Questions made from a collection itself, where nobody wrote any: a rule, no model.

From documents spread evenly over the collection, sentences with a name or a number; of each the content words in their
order, as people type them into a search box. Such questions repeat the words of their passage, so they say nothing
about fusion; for the threshold too, written questions are better.
"""

from __future__ import annotations

from collections.abc import Sequence

from rag.claim_tokens import read_tokens
from rag.language import content_words
from rag.sentences import split_sentences
from services.tuning import TuningQuestion

MAX_QUESTIONS = 200
_MAX_PER_DOCUMENT = 20
_SENTENCE_WORDS = (6, 40)
_KEPT_WORDS = 7


def make_questions(documents: Sequence[tuple[str, str]], limit: int = MAX_QUESTIONS) -> list[TuningQuestion]:
    """Questions to (document id, text) pairs, each answered by its document. The same documents give the same ones."""
    per_document = max(1, min(_MAX_PER_DOCUMENT, -(-limit // max(1, len(documents)))))
    step = max(1, len(documents) // limit)
    made: list[TuningQuestion] = []
    for identity, text in documents[::step]:
        sentences = _tellings(text)
        chosen = sentences[:: max(1, len(sentences) // per_document)][:per_document]
        made += [TuningQuestion(question, frozenset([identity])) for question in map(_as_question, chosen) if question]
    return made[:limit]


def as_far_questions(questions: Sequence[TuningQuestion]) -> list[TuningQuestion]:
    """The same questions asked of a collection that does not answer them."""
    return [TuningQuestion(question.text, frozenset()) for question in questions]


def _tellings(text: str) -> list[str]:
    """Sentences that say something which one could ask for."""
    low, high = _SENTENCE_WORDS
    sentences = [text[span.start : span.end] for span in split_sentences(text)]
    return [
        sentence
        for sentence in sentences
        if low <= len(sentence.split()) <= high
        and any(token.is_name or token.is_number for token in read_tokens(sentence))
    ]


def _as_question(sentence: str) -> str:
    words = content_words(sentence)
    return " ".join(words[:_KEPT_WORDS]) if len(words) >= 3 else ""
