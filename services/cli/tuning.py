"""`tune`: fits a collection's search and its refusals to its own questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption
from services.cli.output import put, put_json, say
from services.setup_errors import ConfigError

CollectionArgument = Annotated[str, typer.Argument(help="Name of the collection.")]


def tune(
    collection: CollectionArgument,
    questions: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Test set in the layout of BEIR whose document ids are names of documents here. Without: questions "
            "are made from the collection's own sentences, and only the threshold is fitted.",
        ),
    ] = None,
    far: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Test set whose questions nothing in this collection answers.")
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Go back to the settings of the configuration.")] = False,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit "the documents do not say" and the fusion to a collection's own questions; error rates are kept and shown."""
    from services.cli.client import open_client

    if far is not None and questions is None:
        raise ConfigError("--far needs --questions: name the collection's own questions too.")
    if forget and questions is not None:
        raise ConfigError("--forget takes no questions.")
    with open_client(home, api, key) as client:
        if forget:
            tuned = client.forget_tuning(collection)
        else:
            asked = None if questions is None else read_questions(questions, client.documents(collection), collection)
            tuned = client.tune(collection, asked if asked is None or far is None else asked + read_far(far))
    if as_json:
        put_json({"collection": collection, "tuning": tuned.get("tuning")})
        return
    for line in describe_tuning(tuned.get("tuning")):
        put(line)
    if (tuned.get("tuning") or {}).get("source") == "collection":
        say("Note: made questions repeat the words of their passages. Written ones (--questions) fit better.")


def read_questions(folder: Path, documents: Sequence[Mapping[str, Any]], collection: str) -> list[dict[str, Any]]:
    """The questions of a test set with the ids that its documents have in the collection. Raises `ConfigError` where a
    document is not there; `EvaluationError` where the set is not sound."""
    from rag.judged_set import read_judged_set

    judged = read_judged_set(folder)
    ids = {}
    for document in documents:
        name = str(document["name"])
        ids[name] = ids[Path(name).stem] = str(document["id"])
    found = []
    for query in judged.queries:
        wanted = [name for name, grade in query.judgements.items() if grade > 0]
        missing = [name for name in wanted if name not in ids]
        if missing:
            raise ConfigError(
                f"{collection} has no document {missing[0]!r}, which {folder} names for {query.text[:60]!r}. Ingest "
                "it, or give the set the names of your files as document ids (with or without their ending)."
            )
        found.append({"text": query.text, "documents": [ids[name] for name in wanted]})
    return found


def read_far(folder: Path) -> list[dict[str, Any]]:
    """The questions of a set as ones that nothing answers. Only `queries.jsonl` is read."""
    from rag.judged_set import QUERIES

    path = folder / QUERIES
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        return [{"text": str(line["text"]), "documents": []} for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read as questions ({error}): one JSON object a line, with `text`."
        ) from error


def describe_tuning(tuning: Mapping[str, Any] | None) -> list[str]:
    """What is known of a collection's refusals and fusion, in sentences."""
    if tuning is None:
        return ["Not tuned: the settings of the configuration hold."]
    source = "written" if tuning["source"] == "questions" else "made from the collection"
    lines = [
        f"Threshold {tuning['evidence_threshold']:.4f}, from {tuning['num_questions']} {source} questions.",
        f"Judged on the other half: {error_text(tuning)}.",
    ]
    if tuning["fusion"] is not None:
        lines.append(
            f"Fusion {tuning['fusion']}, weight of meaning {tuning['dense_weight']:g}: nDCG@10 {tuning['ndcg@10']:.3f} "
            f"(before {tuning['ndcg@10_before']:.3f})."
        )
    return lines


def error_text(tuning: Mapping[str, Any]) -> str:
    """Both kinds of errors in percent."""
    errors = {name: rate for name, rate in tuning["errors"].items() if rate is not None}
    refusals = f"{100 * errors['wrong_refusals']:.1f} % wrongly refused" if "wrong_refusals" in errors else ""
    answers = [
        f"{100 * errors[name]:.1f} % {kind}"
        for name, kind in (("wrong_answers_far", "of other topics"), ("wrong_answers_near", "with their document gone"))
        if name in errors
    ]
    return ", ".join(filter(None, [refusals, f"wrongly answered {' and '.join(answers)}" if answers else ""]))
