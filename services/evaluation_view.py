"""An evaluation of retrieval as data for scripts and as tables for people: means, intervals, differences, latencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rag.judged_set import JudgedSet
from rag.significance import NUM_SAMPLES, SEED, Estimate, PairedDifference, bootstrap_mean, compare_paired
from services.retrieval_evaluation import Leg, LegScores, Measurement

COMPARED_BY = "ndcg@10"
_DIGITS = 6
_PERCENTILES = (50, 95)


def evaluation_json(judged: JudgedSet, measured: Sequence[Measurement]) -> dict[str, Any]:
    """One object: the legs of the first configuration at the top, a second one below `against`.

    Metrics are means over the questions, from 0 to 1; `interval_95` holds the limits of each. `difference` is the first
    configuration minus the second.
    """
    first, *others = measured
    answer = {
        "set": str(judged.folder),
        "num_documents": len(judged.documents),
        "num_queries": len(judged.queries),
        "num_queries_left_out": judged.num_left_out,
        "num_samples": NUM_SAMPLES,
        "seed": SEED,
        **_measurement_json(first),
    }
    for second in others:
        answer["against"] = _measurement_json(second)
        answer["difference"] = {
            leg: {COMPARED_BY: _difference_json(first, second, leg)} for leg in _shared(first, second)
        }
    return answer


def print_evaluation(console: Console, judged: JudgedSet, measured: Sequence[Measurement]) -> None:
    left_out = f" ({judged.num_left_out} without a relevant document left out)" if judged.num_left_out else ""
    console.print(
        f"{judged.folder}: {len(judged.documents)} documents, {len(judged.queries)} questions{left_out}", markup=False
    )
    first, *others = measured
    console.print(_table(first))
    if "reranked" in first.legs:
        console.print(f"nDCG@10, reranked minus fused: {_difference_text(_gain(first))}", markup=False)
    for second in others:
        console.print(_table(second))
        console.print(f"nDCG@10, {_varied(first, second)} minus {_varied(second, first)}:", markup=False)
        for leg in _shared(first, second):
            console.print(f"  {leg:8}  {_difference_text(_difference(first, second, leg))}", markup=False)
    console.print(
        "In percent, below each its 95 % bootstrap interval. p50, p95: ms of a search, without HTTP.",
        markup=False,
    )


def _measurement_json(measurement: Measurement) -> dict[str, Any]:
    return {
        "config": measurement.settings.values(),
        "embedding_model": measurement.embedding_model,
        "num_passages": measurement.num_passages,
        "indexing_s": round(measurement.indexing_s, 3),
        **{leg: _leg_json(scores) for leg, scores in measurement.legs.items()},
        **_reranking_json(measurement),
    }


def _reranking_json(measurement: Measurement) -> dict[str, Any]:
    """What reranking brings: its leg minus the fused one, question by question."""
    if "reranked" not in measurement.legs:
        return {}
    gain = _gain(measurement)
    return {
        "reranked_minus_fused": {
            COMPARED_BY: {
                "mean": round(gain.mean, _DIGITS),
                "interval_95": _limits(gain),
                "p_value": round(gain.p_value, _DIGITS),
            }
        }
    }


def _gain(measurement: Measurement) -> PairedDifference:
    reranked, fused = measurement.legs["reranked"], measurement.legs["fused"]
    return compare_paired(reranked.metrics[COMPARED_BY], fused.metrics[COMPARED_BY])


def _leg_json(scores: LegScores) -> dict[str, Any]:
    estimates = {name: bootstrap_mean(values) for name, values in scores.metrics.items()}
    return {
        **{name: round(estimate.mean, _DIGITS) for name, estimate in estimates.items()},
        "interval_95": {name: _limits(estimate) for name, estimate in estimates.items()},
        "latency_ms": {f"p{each}": round(value, 3) for each, value in _latencies(scores).items()},
    }


def _shared(first: Measurement, second: Measurement) -> list[Leg]:
    """Legs that both have: `reranked` where each has a reranker."""
    return [leg for leg in first.legs if leg in second.legs]


def _difference(first: Measurement, second: Measurement, leg: Leg) -> PairedDifference:
    return compare_paired(first.legs[leg].metrics[COMPARED_BY], second.legs[leg].metrics[COMPARED_BY])


def _difference_json(first: Measurement, second: Measurement, leg: Leg) -> dict[str, Any]:
    difference = _difference(first, second, leg)
    return {
        "mean": round(difference.mean, _DIGITS),
        "interval_95": _limits(difference),
        "p_value": round(difference.p_value, _DIGITS),
        "test": "two-sided paired randomization",
    }


def _limits(estimate: Estimate | PairedDifference) -> list[float]:
    return [round(estimate.low, _DIGITS), round(estimate.high, _DIGITS)]


def _latencies(scores: LegScores) -> dict[int, float]:
    return {each: float(np.percentile(scores.latency_ms, each)) for each in _PERCENTILES}


def _table(measurement: Measurement) -> Table:
    names = list(next(iter(measurement.legs.values())).metrics)
    settings = " ".join(f"{name}={value}" for name, value in measurement.settings.values().items())
    table = Table(title=settings, title_justify="left", title_style="bold")
    table.add_column("leg")
    for name in (*names, *(f"p{each}" for each in _PERCENTILES)):
        table.add_column(name, justify="right", no_wrap=True)
    for leg, scores in measurement.legs.items():
        cells = [_estimate_text(bootstrap_mean(scores.metrics[name])) for name in names]
        table.add_row(leg, *cells, *(f"{value:.1f}" for value in _latencies(scores).values()))
    return table


def _estimate_text(estimate: Estimate) -> str:
    """On two lines, so that a table fits into 80 columns."""
    return f"{100 * estimate.mean:.1f}\n{100 * estimate.low:.1f}-{100 * estimate.high:.1f}"


def _difference_text(difference: PairedDifference) -> str:
    low, high = (f"{100 * limit:+.1f}" for limit in (difference.low, difference.high))
    return f"{100 * difference.mean:+.2f} ({low} to {high}), p = {difference.p_value:.4f} (paired randomization test)"


def _varied(measurement: Measurement, other: Measurement) -> str:
    """The settings in which two configurations differ."""
    theirs = other.settings.values()
    own = measurement.settings.values()
    return " ".join(f"{name}={value}" for name, value in own.items() if theirs[name] != value)
