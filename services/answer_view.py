"""An evaluation of answers as data for scripts and as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rag.judged_set import JudgedSet
from rag.significance import bootstrap_mean
from services.answer_evaluation import AnsweredQuestion, AnswerMeasurement

_DIGITS = 4


def answers_json(judged: JudgedSet, measured: AnswerMeasurement) -> dict[str, Any]:
    """One object: the set, and its figures."""
    return {"set": str(judged.folder), **answer_figures(measured)}


def answer_figures(measured: AnswerMeasurement) -> dict[str, Any]:
    """Shares are from 0 to 1; None where there was nothing to count. What is right, grounded and cited counts the
    questions that were not refused, `right_of_all` all of them."""
    asked = measured.answered
    told = [each for each in asked if each.evidence != "none"]
    return {
        "model": measured.model,
        "embedding_model": measured.embedding_model,
        "num_questions": len(asked),
        "num_passages": measured.num_passages,
        "right": {
            "exact_match": _share(each.is_exact for each in told),
            "token_f1": _mean([each.f1 for each in told]),
            "holds_answer": _share(each.holds_answer for each in told),
            "right_of_all": _share(each.holds_answer for each in asked),
        },
        "grounded": {
            "answers_with_citation": _share(each.num_citations > 0 for each in told),
            "unsupported_sentences": _ratio(told, "num_unsupported", "num_claims"),
            "num_sentences": sum(each.num_claims for each in told),
            "only_quoted": _share(each.evidence == "quoted" for each in told),
        },
        "citations": {
            "first_span_holds_answer": _share(each.first_holds_answer for each in told if each.num_citations),
            "interval_95": _interval([float(bool(each.first_holds_answer)) for each in told if each.num_citations]),
            "precision": _ratio(told, "num_right_citations", "num_citations"),
            "recall": _share(each.cites_relevant for each in told),
            "num_spans": sum(each.num_citations for each in told),
            "num_spans_that_exist": sum(each.num_exact_spans for each in told),
        },
        "refusals": {
            "wrong_refusals": _share(each.evidence == "none" for each in asked),
            "wrong_answers_near": _share(measured.near),
            "wrong_answers_far": _share(measured.far),
            "num_far": len(measured.far),
        },
        "seconds": {
            "total": round(sum(each.took_s for each in asked), 1),
            **{f"p{each}": round(float(np.percentile([a.took_s for a in asked], each)), 2) for each in (50, 95)},
        },
    }


def print_answers(console: Console, judged: JudgedSet, measured: AnswerMeasurement) -> None:
    found = answers_json(judged, measured)
    console.print(f"{found['set']}: {found['num_questions']} questions to {found['model']}", markup=False)
    table = Table("", "", box=None, show_header=False)
    for group in ("right", "grounded", "citations", "refusals"):
        for name, value in found[group].items():
            table.add_row(f"{group}: {name.replace('_', ' ')}", _text(name, value))
    console.print(table)
    seconds = found["seconds"]
    console.print(f"{seconds['total']} s in all; one answer: median {seconds['p50']} s, p95 {seconds['p95']} s")


def _text(name: str, value: Any) -> str:
    if value is None:
        return "nothing to count"
    if name.startswith("num_"):
        return str(value)
    values = value if isinstance(value, list) else [value]
    return " to ".join(f"{100 * each:.1f} %" for each in values)


def _ratio(told: Sequence[AnsweredQuestion], part: str, whole: str) -> float | None:
    number = sum(getattr(each, whole) for each in told)
    return round(sum(getattr(each, part) for each in told) / number, _DIGITS) if number else None


def _share(outcomes: Iterable[bool | None]) -> float | None:
    return _mean([float(bool(outcome)) for outcome in outcomes])


def _mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), _DIGITS) if values else None


def _interval(values: Sequence[float]) -> list[float] | None:
    if not values:
        return None
    estimate = bootstrap_mean(values)
    return [round(estimate.low, _DIGITS), round(estimate.high, _DIGITS)]
