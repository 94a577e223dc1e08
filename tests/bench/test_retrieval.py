"""The parts of `make bench-retrieval` that need no model: tuned figures, and the speed half left out."""

from __future__ import annotations

import pytest

from rag.evidence_threshold import is_for_fitting
from services.config import AppConfig
from services.evaluation_settings import EvaluationSettings
from tests.bench import scale
from tests.bench.tuning import measure_tuning
from tests.services.ingesting import HashEmbedder
from tests.services.test_retrieval_evaluation import judged_set, opener

SETTINGS = EvaluationSettings.of(AppConfig()).with_values({"chunk_tokens": "256", "chunk_overlap_tokens": "8"})
TOPICS = ("salary", "harbour", "engine", "garden", "contract", "recipe")
NUM_QUESTIONS = 44
ALIKE = judged_set(
    {
        f"d{n}": f"About the {TOPICS[n % 6]}: note {n} of the {TOPICS[n % 5]} office." + " more" * n
        for n in range(3 * NUM_QUESTIONS)
    },
    {f"q{n}": (f"What does the {TOPICS[n % 6]} office of {n} say?", {f"d{3 * n}": 1}) for n in range(NUM_QUESTIONS)},
)
"""So many documents with the same words that the right one is often found late. No two are of the same length, so that
few score alike."""


async def test_tuned_figures_reach_to_the_hundredth_passage() -> None:
    found = (await measure_tuning(ALIKE, SETTINGS, opener(HashEmbedder())))["tuned"]
    assert found["num_judged"] == sum(not is_for_fitting(query.text) for query in ALIKE.queries)
    for name, (low, high) in found["fused"]["interval_95"].items():
        assert low <= found["fused"][name] <= high, name
    assert found["fused_default"]["recall@100"] > found["fused_default"]["recall@10"]


def test_without_a_part_of_the_speed_half_no_windfarm_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("started")

    for name in ("run_python", "running_windfarm", "Comparison"):
        monkeypatch.setattr(scale, name, start)
    assert scale.measure_scale(scale.SETS, scale.ScaleOptions(passages=0, compared=0, rounds=0)) == {}
    with pytest.raises(AssertionError, match="started"):
        scale.measure_scale(scale.SETS, scale.ScaleOptions(passages=0, compared=0, rounds=1))
