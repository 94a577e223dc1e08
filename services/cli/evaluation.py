"""`eval`: how good windfarm is on questions whose answers are known."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption, config_path_of, home_of
from services.cli.output import put, put_json, say
from services.setup_errors import ConfigError

if TYPE_CHECKING:
    from services.evaluation_index import Report
    from services.evaluation_settings import EvaluationSettings

app = typer.Typer(name="eval", help="Measure quality on questions whose answers are known.", no_args_is_help=True)


@app.callback()
def evaluation() -> None:
    """Measure quality on questions whose answers are known."""


@app.command()
def retrieval(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with corpus.jsonl, queries.jsonl and qrels.tsv (BEIR layout).")
    ],
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            metavar="NAME=VALUE|FILE",
            help="A setting, such as fusion=rrf, or a configuration file. May be given several times.",
            show_default="ray_config.yaml",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="NAME=VALUE|FILE", help="The same for a second one to compare with."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how well search finds what is relevant, each leg alone and fused. Needs no running windfarm.

    Settings: candidates, fusion, dense_weight, chunk_tokens, chunk_overlap_tokens; source and precision of the
    embedding model. The set is indexed in a temporary folder; collections are not touched.
    """
    from rich.console import Console

    from rag.judged_set import read_judged_set
    from services.evaluation_view import evaluation_json, print_evaluation
    from services.retrieval_evaluation import evaluate

    home_of(home)
    configurations = [_settings(config or [])]
    if against:
        configurations.append(_settings(against))
        if configurations[0].values() == configurations[1].values():
            raise ConfigError("--config and --against say the same. Change a setting in one of them.")
    judged = read_judged_set(folder)
    if judged.num_left_out:
        say(f"Note: {judged.num_left_out} questions have no relevant document and are left out.")
    # The temporary folder goes also when a service manager or `timeout` ends the command.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _progress(is_quiet=as_json) as report:
        measured = asyncio.run(evaluate(judged, configurations, report=report))
    if as_json:
        put_json(evaluation_json(judged, measured), one_line=True)
    else:
        print_evaluation(Console(), judged, measured)


@app.command()
def answers(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Test set in the layout of BEIR with answers.jsonl (`_id`, `answers`)."),
    ],
    far: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Test set with questions on other topics, which should be refused."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Chat model.", show_default="the default")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many questions, evenly chosen.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many of the chosen questions.")] = 0,
    only: Annotated[int | None, typer.Option(min=1, help="Ask so many of the others: a part of a long run.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 48,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", metavar="FILE", help="A configuration file.", show_default="ray_config.yaml"),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure answers: right, grounded in the documents, cited, refused. Needs no running windfarm.

    The set is indexed in a temporary folder; each question goes through the chat of the product with the configured
    model, in this process. Near negatives are the same questions with their documents taken out.
    """
    from rich.console import Console

    from services.answer_command import AnswerOptions, measure_answers
    from services.answer_view import answers_json, print_answers

    home_of(home)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = AnswerOptions(folder, far, model, limit, skip, only, max_tokens, _config_file(config or []))
    with _progress(is_quiet=as_json) as report:
        judged, measured = asyncio.run(measure_answers(options, report))
    if as_json:
        put_json(answers_json(judged, measured), one_line=True)
    else:
        print_answers(Console(), judged, measured)


def _config_file(options: list[str]) -> Path:
    from services.evaluation_settings import split_options

    file, changes = split_options(options)
    if changes:
        raise ConfigError("Answers are measured with a configuration file; single settings belong to `eval retrieval`.")
    if file is None and (named := os.environ.get("WINDFARM_CONFIG")):
        file = Path(named)
    return config_path_of(file)


@app.command(name="from-feedback")
def from_feedback(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder for the test set.")],
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Only questions about this collection.")
    ] = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a test set of the feedback that `windfarm feedback accept` accepted, for `windfarm eval retrieval DIR`."""
    from services.cli.client import open_client
    from services.feedback_test_set import write_test_set

    with open_client(home, api, key) as client:
        written = write_test_set(client, folder, collection)
    if as_json:
        put_json({"folder": str(folder), **written.numbers})
        return
    put(f"{folder}: {written.num_queries} questions on {written.num_documents} documents.")
    if written.num_left_out:
        say(f"{written.num_left_out} accepted questions were left out: their documents are gone or not yours to read.")
    put(f"Measure with: windfarm eval retrieval {folder}")


def _settings(options: list[str]) -> EvaluationSettings:
    from services.evaluation_settings import EvaluationSettings, split_options
    from services.ray_config import load_ray_config

    file, changes = split_options(options)
    if file is None and (named := os.environ.get("WINDFARM_CONFIG")):
        file = Path(named)
    return EvaluationSettings.of(load_ray_config(config_path_of(file)).app).with_values(changes)


@contextmanager
def _progress(*, is_quiet: bool) -> Iterator[Report]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=is_quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def report(step: str, done: int, total: int) -> None:
            progress.update(task, description=step, completed=done, total=total)

        yield report
