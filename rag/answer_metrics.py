"""How near an answer is to reference answers: exact match, token F1, and whether it holds one.

The definitions are those of SQuAD (Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text",
EMNLP 2016): lower case, without punctuation and articles; of several references the best counts. Articles are those of
five languages. Pure functions.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from rag.errors import EvaluationError

ANSWERS = "answers.jsonl"
_ARTICLE_LIST = """
    a an the der die das dem den des ein eine einen einem einer eines le la les l un une il lo i gli uno una el los
    las unos unas
"""
_ARTICLES = frozenset(_ARTICLE_LIST.split())
_WORD = re.compile(r"\w+")


def normalize(text: str) -> list[str]:
    """Lower-case words without articles; thousands are written together."""
    joined = re.sub(r"(?<=\d)[.,\u00a0\u202f' ](?=\d{3}\b)", "", text.lower())
    return [word for word in _WORD.findall(joined) if word not in _ARTICLES]


def exact_match(answer: str, references: Sequence[str]) -> bool:
    said = normalize(answer)
    return any(said == normalize(reference) for reference in references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the shares of common words; 0 where there are none."""
    return max((_f1(normalize(answer), normalize(reference)) for reference in references), default=0.0)


def holds_answer(text: str, references: Sequence[str]) -> bool:
    """Whether one of the references stands in the text, word for word."""
    said = f" {' '.join(normalize(text))} "
    wanted = [" ".join(normalize(reference)) for reference in references]
    return any(reference and f" {reference} " in said for reference in wanted)


def read_references(folder: Path, queries: Collection[str]) -> dict[str, list[str]]:
    """Reference answers by question id, from `answers.jsonl` (`_id`, `answers`). Raises `EvaluationError`."""
    path = folder / ANSWERS
    found: dict[str, list[str]] = {}
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be read ({error.strerror}). Put one JSON object a line into it: `_id`, `answers`."
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
            identity, answers = str(record["_id"]), record["answers"]
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{place} is no object with `_id` and `answers` ({error!r}).") from error
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise EvaluationError(f"{place}: `answers` is no list of texts.")
        found[identity] = [answer for answer in answers if answer.strip()]
    known = {identity: answers for identity, answers in found.items() if identity in queries and answers}
    if not known:
        raise EvaluationError(f"{path} answers none of the questions. Its `_id`s must be those of queries.jsonl.")
    return known


def _f1(said: list[str], wanted: list[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
