"""What an evaluation of retrieval may vary: the settings of `ray_config.yaml` that decide what a search finds.

A configuration is that file with single settings written over it, as `NAME=VALUE`. Settings that change no ranking are
refused rather than accepted and ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.config import AppConfig, EmbeddingConfig, IngestionConfig, RetrievalConfig
from services.setup_errors import ConfigError

RETRIEVAL = ("candidates", "fusion", "dense_weight", "rerank", "rerank_candidates")
INGESTION = ("chunk_tokens", "chunk_overlap_tokens")
EMBEDDING = ("source", "precision", "reranker")
NAMES = (*RETRIEVAL, *INGESTION, *EMBEDDING)
_WITHOUT_EFFECT = ("top_k", "evidence_threshold")


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """The sections of the configuration that retrieval reads."""

    retrieval: RetrievalConfig
    ingestion: IngestionConfig
    embed: EmbeddingConfig

    @classmethod
    def of(cls, config: AppConfig) -> EvaluationSettings:
        return cls(config.platform.retrieval, config.store.ingestion, config.embed)

    def values(self) -> dict[str, Any]:
        """Every setting that can be varied, by name."""
        return {name: getattr(section, name) for section, names in self._sections() for name in names}

    def with_values(self, changes: Mapping[str, str]) -> EvaluationSettings:
        """These settings with some written over. Raises `ConfigError` for unknown names and wrong values."""
        for name in changes:
            _check_name(name)
        changed = []
        for section, names in self._sections():
            values = section.model_dump() | {name: changes[name] for name in names if name in changes}
            try:
                changed.append(type(section).model_validate(values))
            except ValidationError as error:
                raise ConfigError(_explain(error, changes)) from error
        return EvaluationSettings(*changed)

    def shares_index_with(self, other: EvaluationSettings) -> bool:
        """Whether both store the same passages with the same vectors, so that they can search in one index."""
        own, others = (each.embed.model_copy(update={"reranker": None}) for each in (self, other))
        return (self.ingestion, own) == (other.ingestion, others)

    def _sections(self) -> tuple[tuple[Any, tuple[str, ...]], ...]:
        return (self.retrieval, RETRIEVAL), (self.ingestion, INGESTION), (self.embed, EMBEDDING)


def split_options(options: Sequence[str]) -> tuple[Path | None, dict[str, str]]:
    """A configuration file, if one is among the options, and the `NAME=VALUE` settings. Raises `ConfigError`."""
    files = [Path(option) for option in options if "=" not in option]
    if len(files) > 1:
        raise ConfigError(f"Two configuration files, {files[0]} and {files[1]}: name one, and settings as NAME=VALUE.")
    changes: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            continue
        if name.strip() in changes:
            raise ConfigError(f"The setting {name.strip()} is given twice.")
        changes[name.strip()] = value.strip()
    return (files[0] if files else None), changes


def _check_name(name: str) -> None:
    if name in NAMES:
        return
    if name in _WITHOUT_EFFECT:
        raise ConfigError(f"{name} changes no ranking, so it cannot be evaluated. Valid settings: {', '.join(NAMES)}.")
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Valid settings: {', '.join(NAMES)}."
    raise ConfigError(f"There is no setting {name!r}. {hint}")


def _explain(error: ValidationError, changes: Mapping[str, str]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    return f"{name}={changes.get(name, first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}."
