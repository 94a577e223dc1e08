"""What an evaluation may vary: by name, checked like the file, and nothing that has no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config import AppConfig
from services.evaluation_settings import NAMES, EvaluationSettings, split_options
from services.setup_errors import ConfigError

DEFAULTS = EvaluationSettings.of(AppConfig())


def test_every_setting_can_be_varied_and_takes_effect() -> None:
    changes = {
        "candidates": "20",
        "fusion": "rrf",
        "dense_weight": "0.25",
        "chunk_tokens": "64",
        "chunk_overlap_tokens": "0",
        "source": "./folder",
        "precision": "fp32",
        "rerank": "http://127.0.0.1:9/rerank",
        "rerank_candidates": "10",
        "reranker": "./folder",
    }
    assert set(changes) == set(NAMES)
    changed = DEFAULTS.with_values(changes)
    assert changed.values() == {
        "candidates": 20,
        "fusion": "rrf",
        "dense_weight": 0.25,
        "chunk_tokens": 64,
        "chunk_overlap_tokens": 0,
        "source": "./folder",
        "precision": "fp32",
        "rerank": "http://127.0.0.1:9/rerank",
        "rerank_candidates": 10,
        "reranker": "./folder",
    }
    assert DEFAULTS.with_values({}) == DEFAULTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuson": "rrf"}, r"There is no setting 'fuson'\. Did you mean fusion\?"),
        ({"zzz": "1"}, r"There is no setting 'zzz'\. Valid settings: candidates, fusion"),
        ({"top_k": "5"}, r"top_k changes no ranking"),
        ({"evidence_threshold": "0.5"}, r"evidence_threshold changes no ranking"),
        ({"fusion": "best"}, r"fusion=best: input should be 'rrf', 'minmax' or 'dbsf'"),
        ({"dense_weight": "1.5"}, r"dense_weight=1\.5: input should be less than or equal to 1"),
        ({"candidates": "many"}, r"candidates=many: input should be a valid integer"),
        ({"chunk_tokens": ""}, r"chunk_tokens=: input should be a valid integer"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_next_step(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DEFAULTS.with_values(changes)


def test_only_settings_of_passages_and_vectors_need_an_index_of_their_own() -> None:
    for name, value in {"candidates": "7", "fusion": "rrf", "dense_weight": "0", "reranker": "./x"}.items():
        assert DEFAULTS.shares_index_with(DEFAULTS.with_values({name: value}))
    for name, value in {"chunk_tokens": "64", "chunk_overlap_tokens": "1", "source": "x", "precision": "fp32"}.items():
        assert not DEFAULTS.shares_index_with(DEFAULTS.with_values({name: value}))


def test_options_are_a_file_and_settings() -> None:
    assert split_options([]) == (None, {})
    assert split_options(["my.yaml", "fusion=rrf", " candidates = 20"]) == (
        Path("my.yaml"),
        {"fusion": "rrf", "candidates": "20"},
    )
    with pytest.raises(ConfigError, match=r"Two configuration files, a\.yaml and b\.yaml"):
        split_options(["a.yaml", "b.yaml"])
    with pytest.raises(ConfigError, match="fusion is given twice"):
        split_options(["fusion=rrf", "fusion=dbsf"])
