"""What `windfarm eval answers` does: read the sets, start the configured models in this process, measure."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rag.answer_metrics import read_references
from rag.errors import EvaluationError
from rag.judged_set import JudgedQuery, JudgedSet, read_judged_set
from services.answer_evaluation import AnswerMeasurement, evaluate_answers, running_engine
from services.config import AppConfig, ModelConfig
from services.environment import SECRET_VARIABLE, read_environment
from services.evaluation_index import OpenModel, Report, open_serving_model
from services.ray_config import load_ray_config
from services.setup_errors import ConfigError


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """See the options of the command."""

    folder: Path
    far: Path | None
    model: str | None
    limit: int | None
    skip: int
    only: int | None
    max_tokens: int
    config: Path


async def measure_answers(
    options: AnswerOptions, report: Report, *, open_model: OpenModel = open_serving_model
) -> tuple[JudgedSet, AnswerMeasurement]:
    """Raises `ConfigError` and `EvaluationError`."""
    from services.model_server import build_engine

    judged = read_judged_set(options.folder)
    references = read_references(options.folder, {query.id for query in judged.queries})
    with_reference = [query for query in judged.queries if query.id in references]
    asked = replace(judged, queries=tuple(_chosen(with_reference, options)))
    far = [query.text for query in read_judged_set(options.far).queries] if options.far else []
    app = load_ray_config(options.config).app
    model = _model(app, options.model)
    environment = read_environment({**os.environ, SECRET_VARIABLE: secrets.token_hex(16)})
    report("loading the chat model", 0, 1)
    engine = await asyncio.to_thread(build_engine, model, environment)
    async with running_engine(engine):
        measured = await evaluate_answers(
            asked,
            references,
            far[: options.limit],
            app,
            engine,
            max_tokens=options.max_tokens,
            open_model=open_model,
            report=report,
        )
    return asked, measured


def _chosen(queries: Sequence[JudgedQuery], options: AnswerOptions) -> Sequence[JudgedQuery]:
    """Every so many, so that a part of a set speaks for the whole."""
    limit = options.limit or len(queries)
    step = max(1, len(queries) // limit)
    chosen = queries[::step][:limit][options.skip :][: options.only]
    if not chosen:
        raise EvaluationError(f"--skip {options.skip} leaves none of {min(limit, len(queries))} questions.")
    return chosen


def _model(app: AppConfig, name: str | None) -> ModelConfig:
    wanted = name or app.platform.default_model
    found = next((model for model in app.models.values() if model.id == wanted), None)
    if found is None:
        known = ", ".join(sorted(model.id for model in app.models.values()))
        raise ConfigError(f"There is no chat model {wanted!r} in the configuration. There are: {known}.")
    return found
