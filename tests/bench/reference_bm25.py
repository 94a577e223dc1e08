"""`bm25s` (method lucene) over the passages that the product stores, as the reference for its sparse leg.

Same passages, stemmer and stop words; but it knows the language of all texts, their true average length, and sums over
whole words, while the product detects the language and keeps a constant length.
"""

from collections.abc import Sequence

import numpy as np

from rag.bm25 import K1, MAX_WORD_LENGTH, B
from rag.judged_set import JudgedSet
from rag.language import STOP_WORDS, Language, stem, words
from rag.types import StoredChunk
from rag.vector_store import searchable_text


def reference_rankings(judged: JudgedSet, passages: Sequence[StoredChunk], language: Language) -> list[list[str]]:
    """For each question the documents that share a word with it, best passage first."""
    import bm25s

    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index([terms(searchable_text(passage), language) for passage in passages], show_progress=False)
    rankings = []
    for query in judged.queries:
        scores = index.get_scores(terms(query.text, language))
        order = [position for position in np.argsort(-scores, kind="stable") if scores[position] > 0]
        rankings.append(list(dict.fromkeys(passages[position].document_id for position in order)))
    return rankings


def terms(text: str, language: Language) -> list[str]:
    """A text without content words gives one that no other has: bm25s takes no empty text."""
    kept = [word for word in words(text) if word not in STOP_WORDS[language]]
    return [stem(word[:MAX_WORD_LENGTH], language) for word in kept] or ["\0"]
