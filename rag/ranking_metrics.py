"""How good a ranking of documents is: nDCG, reciprocal rank and recall, each cut at a depth, for one question.

Pure functions. A ranking is a list of document ids, best first, each once. Judgements map document ids to grades; a
document that is not listed, or whose grade is zero or less, is not relevant. The definitions are those of trec_eval
(`ndcg_cut`, `recip_rank`, `recall`), so numbers compare with published ones. A question without any relevant
document scores 0 everywhere, as in trec_eval; whether to count it is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rag.types import Passage

Judgements = Mapping[str, int]


def ndcg(ranking: Sequence[str], judgements: Judgements, depth: int) -> float:
    """Normalised discounted cumulative gain: the sum of grade / log2(rank + 1) over the first `depth` documents,
    divided by that of the best possible ranking. Jaervelin and Kekaelaeinen, "Cumulated gain-based evaluation of IR
    techniques", TOIS 2002, with the grade itself as gain (not 2 to its power)."""
    best = _discounted_gain(sorted(_gains(judgements.values()), reverse=True)[:depth])
    if best == 0:
        return 0.0
    return _discounted_gain(_gains(judgements.get(document, 0) for document in ranking[:depth])) / best


def reciprocal_rank(ranking: Sequence[str], judgements: Judgements, depth: int) -> float:
    """1 / rank of the first relevant document among the first `depth`, else 0. Its mean over questions is MRR:
    Voorhees, "The TREC-8 Question Answering Track Report", TREC 1999."""
    for rank, document in enumerate(ranking[:depth], start=1):
        if judgements.get(document, 0) > 0:
            return 1.0 / rank
    return 0.0


def recall(ranking: Sequence[str], judgements: Judgements, depth: int) -> float:
    """The share of all relevant documents that are among the first `depth`; grades above zero count alike. Manning,
    Raghavan, Schuetze, "Introduction to Information Retrieval", 2008, chapter 8."""
    relevant = {document for document, grade in judgements.items() if grade > 0}
    return len(relevant.intersection(ranking[:depth])) / len(relevant) if relevant else 0.0


def rank_documents(passages: Iterable[Passage]) -> list[str]:
    """Documents in the order of their best passage; further passages of a document do not count. `passages` come best
    first, so passages of equal score keep the order in which the retriever broke the tie."""
    return list(dict.fromkeys(passage.chunk.document_id for passage in passages))


def _gains(grades: Iterable[int]) -> list[int]:
    return [max(0, grade) for grade in grades]


def _discounted_gain(gains: Sequence[int]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
