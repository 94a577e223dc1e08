"""`make bench-answers`: what whole answers are worth, over three languages. The last line is one JSON object.

    ARGS="--results FILE --pieces 1"    measures one piece more than FILE has (minutes), and shows all that it has
    ARGS="--languages en fr"            some of the languages; `--limit`: questions of each

Each piece asks some of the questions of one set as `windfarm eval answers DIR --far OTHER` does, with the configured
model in this process. Answers are kept one by one, so that each language and `pooled` are what one run over all of the
questions would say. Far questions are in another language: no two sets of one language are here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag.significance import NUM_SAMPLES, SEED, bootstrap_mean
from services.answer_command import AnswerOptions, measure_answers
from services.answer_evaluation import AnsweredQuestion, AnswerMeasurement
from services.answer_view import answer_figures

ROOT = Path(__file__).resolve().parents[2]
SETS = ROOT / "tests" / "data" / "multilingual-qa-mini"
FAR = {"en": "fr", "de": "fr", "fr": "en"}
"""The paragraphs of the German set are those of the English one."""
_IN_A_PIECE = 35
_MAX_TOKENS = 48


@dataclass(frozen=True)
class Piece:
    """`number` questions of a language after the first `skip`."""

    language: str
    skip: int
    number: int

    @property
    def name(self) -> str:
        return f"{self.language} {self.skip}+{self.number}"


Measured = tuple[str, AnswerMeasurement]
"""A language, and what a piece of it came to."""


def main() -> None:
    options = read_options()
    results: dict[str, Any] = {}
    if options.results is not None and options.results.exists():
        results = json.loads(options.results.read_text("utf-8"))
    wanted = pieces_of(options.languages, options.limit)
    missing = [piece for piece in wanted if piece.name not in results]
    for piece in missing[: options.pieces]:
        measured = asyncio.run(measure(piece, options.limit))
        results[piece.name] = asdict(measured)
        print(f"{piece.name}: {figures([(piece.language, measured)])}", flush=True)
        if options.results is not None:
            options.results.write_text(json.dumps(results), "utf-8")
    print(json.dumps(summary(wanted, results)))


def pieces_of(languages: Sequence[str], limit: int) -> list[Piece]:
    starts = range(0, limit, _IN_A_PIECE)
    return [Piece(each, start, min(_IN_A_PIECE, limit - start)) for each in languages for start in starts]


async def measure(piece: Piece, limit: int) -> AnswerMeasurement:
    """The far questions of a language are judged with its first piece."""
    far = None if piece.skip else SETS / FAR[piece.language]
    options = AnswerOptions(
        SETS / piece.language, far, None, limit, piece.skip, piece.number, _MAX_TOKENS, ROOT / "ray_config.yaml"
    )
    return (await measure_answers(options, lambda step, done, total: None))[1]


def summary(wanted: Sequence[Piece], results: Mapping[str, Any]) -> dict[str, Any]:
    """Each language and all together, of those pieces that were measured."""
    parts = [(each.language, measurement(results[each.name])) for each in wanted if each.name in results]
    languages = dict.fromkeys(language for language, _ in parts)
    return {
        "num_pieces": len(parts),
        "num_pieces_left": len(wanted) - len(parts),
        "languages": {each: figures([part for part in parts if part[0] == each]) for each in languages},
        "pooled": figures(parts) if parts else None,
    }


def measurement(stored: Mapping[str, Any]) -> AnswerMeasurement:
    """What was kept, as it was before."""
    answered = tuple(AnsweredQuestion(**each) for each in stored["answered"])
    return AnswerMeasurement(**{**stored, "answered": answered, "near": (*stored["near"],), "far": (*stored["far"],)})


def figures(parts: Sequence[Measured]) -> dict[str, Any]:
    """What `windfarm eval answers` prints, and the main shares with their intervals."""
    measured = pooled(parts)
    told = [each for each in measured.answered if each.evidence != "none"]
    first_spans = [float(bool(each.first_holds_answer)) for each in told if each.num_citations]
    sentences = [(each.num_unsupported, each.num_claims) for each in told]
    return answer_figures(measured) | {
        "shares": {
            "first_span_holds_answer": _share(first_spans),
            "unsupported_sentences": _share_of_sums(sentences),
            "right_of_all": _share(each.holds_answer for each in measured.answered),
            "wrong_refusals": _share(each.evidence == "none" for each in measured.answered),
            "wrong_answers_near": _share(measured.near),
            "wrong_answers_far": _share(measured.far),
        },
        "all_spans_exist": all(each.num_exact_spans == each.num_citations for each in told),
    }


def pooled(parts: Sequence[Measured]) -> AnswerMeasurement:
    """As if all had been asked in one run. Raises `ValueError` where not the same models answered."""
    models = {(each.model, each.embedding_model) for _, each in parts}
    if len(models) > 1:
        raise ValueError(f"Different models answered: {sorted(models)}. Begin a new file of results.")
    ((model, embedding_model),) = models
    num_passages = {language: each.num_passages for language, each in parts}
    return AnswerMeasurement(
        model,
        embedding_model,
        sum(num_passages.values()),
        tuple(answer for _, each in parts for answer in each.answered),
        tuple(is_answered for _, each in parts for is_answered in each.near),
        tuple(is_answered for _, each in parts for is_answered in each.far),
    )


def _share(outcomes: Iterable[float]) -> dict[str, Any] | None:
    values = [float(outcome) for outcome in outcomes]
    if not values:
        return None
    estimate = bootstrap_mean(values)
    return _shown(estimate.mean, estimate.low, estimate.high, len(values))


def _share_of_sums(parts_of: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """Of sentences, by drawing answers again: the sentences of one answer are right or wrong together."""
    counts = np.array([each for each in parts_of if each[1]], dtype=np.float64)
    if not len(counts):
        return None
    drawn = np.random.default_rng(SEED).integers(0, len(counts), (NUM_SAMPLES, len(counts)))
    parts, wholes = counts[drawn].sum(axis=1).T
    low, high = np.quantile(parts / wholes, (0.025, 0.975))
    return _shown(counts[:, 0].sum() / counts[:, 1].sum(), low, high, int(counts[:, 1].sum()))


def _shown(share: float, low: float, high: float, number: int) -> dict[str, Any]:
    return {"share": round(share, 4), "interval_95": [round(low, 4), round(high, 4)], "of": number}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--languages", nargs="+", choices=list(FAR), default=list(FAR))
    parser.add_argument("--limit", type=int, default=70, help="questions of each language, evenly chosen")
    parser.add_argument("--pieces", type=int, help="measure at most so many; default: all that are missing")
    parser.add_argument("--results", type=Path, help="a file with earlier pieces, to add to")
    options = parser.parse_args()
    if options.limit < 1 or (options.pieces is not None and options.pieces < 0):
        parser.error("at least 1 question, and no fewer than 0 pieces")
    return options


if __name__ == "__main__":
    main()
