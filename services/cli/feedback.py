"""`feedback`: what people said of answers, and its review; accepted feedback becomes test questions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption
from services.cli.output import put, put_json

app = typer.Typer(name="feedback", help="Review what people said of answers.", no_args_is_help=True)
IdArgument = Annotated[str, typer.Argument(help="Id of the feedback; `windfarm feedback list` shows it.")]


@app.callback()
def feedback() -> None:
    """Review what people said of answers."""


@app.command(name="list")
def list_feedback(
    state: Annotated[str, typer.Option(help="new, accepted, rejected, or all.")] = "new",
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List feedback with question, answer and cited documents, the newest first."""
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        entries = list(client.feedback(None if state == "all" else state))
    if as_json:
        put_json({"feedback": entries})
        return
    for entry in entries:
        _print(entry)
    if not entries:
        put(f"No feedback is {state}." if state != "all" else "There is no feedback.")


@app.command()
def accept(
    feedback_id: IdArgument,
    relevant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DOCUMENT_ID",
            help="A document that holds the answer; may be given several times.",
            show_default="those that a praised answer cites",
        ),
    ] = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a test question of it (`windfarm eval from-feedback`)."""
    _review(feedback_id, "accepted", relevant or [], home, api, key, as_json=as_json)


@app.command()
def reject(
    feedback_id: IdArgument,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep it out of the test questions."""
    _review(feedback_id, "rejected", [], home, api, key, as_json=as_json)


def _review(
    feedback_id: str, decision: str, relevant: list[str], home: Any, api: Any, key: Any, *, as_json: bool
) -> None:
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        entry = client.review_feedback(feedback_id, decision, relevant)
    if as_json:
        put_json(entry)
    else:
        documents = f", relevant: {', '.join(entry['relevant'])}" if entry["relevant"] else ""
        put(f"{entry['id']} is {entry['state']}{documents}")


def _print(entry: dict[str, Any]) -> None:
    reason = f": {entry['reason']}" if entry["reason"] else ""
    put(f"{entry['id']}  {entry['rating']}{reason}  ({entry['state']})")
    put(f"   asked:    {_line(entry['question'])}")
    hidden = "(rests on documents that you may not read)" if entry["is_hidden"] else ""
    put(f"   answered: {hidden or _line(entry['answer'])}")
    for passage in entry["passages"]:
        if passage["is_cited"]:
            page = f", page {passage['page']}" if passage["page"] else ""
            put(f"   cites:    {passage['document_id']}  {passage['document']}{page}")


def _line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else f"{flat[:199]}…"
