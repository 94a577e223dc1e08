from __future__ import annotations

import pytest

from rag.fusion_sweep import SETTINGS, JudgedHits, best_of_others, choose_fusion, leg_scores, sweep
from rag.ranking import RetrievalSettings
from rag.types import StoredChunk
from rag.vector_store import ScoredChunk

PRESENT = ("dbsf", 0.7)


def hit(document: str, dense: float | None, sparse: float) -> ScoredChunk:
    chunk = StoredChunk(document, "col", document, f"v-{document}", document, document, 0, len(document), 0)
    return ScoredChunk(chunk, dense, sparse)


def question(right: str) -> JudgedHits:
    """Words know the answer, meaning prefers another document."""
    hits = [hit("a", 0.80, 9.0), hit("b", 0.90, 1.0), hit("c", 0.85, 0.5)]
    return JudgedHits(hits, {right: 1})


def test_legs_alone_and_every_setting_are_scored() -> None:
    questions = [question("a")] * 3
    legs = leg_scores(questions, RetrievalSettings())
    assert legs["sparse"] == [1.0] * 3 and legs["dense"][0] < 1.0
    scores = sweep(questions, RetrievalSettings())
    assert set(scores) == set(SETTINGS) and all(len(values) == 3 for values in scores.values())
    assert scores["minmax", 0.2] == [1.0] * 3


def test_another_setting_is_taken_where_it_is_surely_better() -> None:
    scores = sweep([question("a")] * 30, RetrievalSettings())
    chosen = choose_fusion(scores, PRESENT)
    assert chosen.setting != PRESENT
    assert chosen.ndcg == 1.0 > chosen.ndcg_before
    assert chosen.p_value is not None and chosen.p_value <= 0.05


def test_chance_changes_nothing() -> None:
    alike = {setting: [1.0] * 29 + [0.0] for setting in SETTINGS}
    alike["rrf", 0.5] = [1.0] * 30
    chosen = choose_fusion(alike, PRESENT)
    assert chosen.setting == PRESENT
    assert chosen.p_value is not None and chosen.p_value > 0.05


def test_the_present_setting_wins_a_tie() -> None:
    assert choose_fusion({setting: [0.5] * 30 for setting in SETTINGS}, PRESENT).p_value is None


def test_too_few_questions_choose_nothing() -> None:
    with pytest.raises(ValueError, match="19 questions are too few"):
        choose_fusion({setting: [0.5] * 19 for setting in SETTINGS}, PRESENT)


def test_the_set_that_is_left_out_has_no_say() -> None:
    quiet = {setting: [0.5, 0.5] for setting in SETTINGS}
    scores = {
        "one": quiet | {("rrf", 0.5): [1.0, 1.0]},
        "two": quiet | {("minmax", 0.3): [0.8, 0.8]},
        "three": quiet | {("minmax", 0.3): [0.7, 0.7]},
    }
    assert best_of_others(scores, "one") == ("minmax", 0.3)
    assert best_of_others(scores, "two") == ("rrf", 0.5)
