"""`windfarm jobs`: what is on its way into the collections, and pausing, resuming or cancelling it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption
from services.cli.output import put, put_json

if TYPE_CHECKING:
    from services.api_client import ApiClient

app = typer.Typer(name="jobs", help="List, pause, resume and cancel what is on its way in.", no_args_is_help=True)

IdsArgument = Annotated[list[str] | None, typer.Argument(help="Ids of jobs.", show_default=False)]
CollectionOption = Annotated[
    str | None, typer.Option("--collection", "-c", help="All unfinished jobs of this collection.")
]
BatchOption = Annotated[str | None, typer.Option("--batch", help="Only those of this batch of the collection.")]


@app.command(name="list")
def list_jobs(
    collection: Annotated[str | None, typer.Option("--collection", "-c", help="Only of this collection.")] = None,
    batch: Annotated[str | None, typer.Option(help="Only of this batch.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Only in these states: queued, parsing, embedding, done, failed, cancelled.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, max=1000, help="Number of jobs.")] = 50,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """The newest jobs, and how far all of them are."""
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        found = client.jobs(collection=collection, batch=batch, state=state, limit=limit)
    if as_json:
        put_json(found)
        return
    for job in found["data"]:
        put(_line(job))
    put(summary_line(found["summary"]))


@app.command()
def show(
    job_id: Annotated[str, typer.Argument(help="Id of a job.")],
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """All about one job."""
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        job = client.job(job_id)
    if as_json:
        put_json(job)
        return
    for name, value in job.items():
        if value not in (None, [], ""):
            put(f"{name:14} {value['message'] if name == 'error' else value}")


@app.command()
def pause(
    job_ids: IdsArgument = None,
    collection: CollectionOption = None,
    batch: BatchOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop jobs until they are resumed. One that runs begins anew then; paused jobs stay paused over a restart."""
    _change("pause", job_ids, collection, batch, home, api, key, as_json)


@app.command()
def resume(
    job_ids: IdsArgument = None,
    collection: CollectionOption = None,
    batch: BatchOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let paused jobs go on."""
    _change("resume", job_ids, collection, batch, home, api, key, as_json)


@app.command()
def cancel(
    job_ids: IdsArgument = None,
    collection: CollectionOption = None,
    batch: BatchOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """End jobs for good; nothing of their files is kept, and documents that were there before stay as they are."""
    _change("cancel", job_ids, collection, batch, home, api, key, as_json)


def _change(
    action: str,
    job_ids: list[str] | None,
    collection: str | None,
    batch: str | None,
    home: Any,
    api: str | None,
    key: str | None,
    as_json: bool,
) -> None:
    from services.cli.client import open_client

    if bool(job_ids) == bool(collection):
        raise typer.BadParameter(f"Name the jobs to {action}, or a collection with --collection.", param_hint="JOB_IDS")
    if batch and not collection:
        raise typer.BadParameter("--batch needs --collection.", param_hint="--batch")
    with open_client(home, api, key) as client:
        num_jobs = _apply(client, action, job_ids or [], collection, batch)
    if as_json:
        put_json({"action": action, "num_jobs": num_jobs})
    else:
        put(f"{num_jobs} {'job' if num_jobs == 1 else 'jobs'}: {action}")


def _apply(client: ApiClient, action: str, job_ids: list[str], collection: str | None, batch: str | None) -> int:
    if collection is not None:
        return client.change_jobs(collection, action, batch)
    for job_id in job_ids:
        client.change_job(job_id, action)
    return len(job_ids)


def _line(job: dict[str, Any]) -> str:
    state = "paused" if job.get("paused") and job["state"] not in ("done", "failed", "cancelled") else job["state"]
    why = (job.get("error") or {}).get("message") or job.get("waiting_for") or ""
    name = job["filename"] or job["kind"]
    line = f"{job['id']}  {state:9} {job.get('progress') or 0:4.0%}  {job['collection']}: {name}"
    return f"{line}: {why}" if why else line


def summary_line(summary: dict[str, Any]) -> str:
    """Counts, part that is done, speed and time left in one line."""
    parts = [f"{count} {state}" for state, count in summary["states"].items() if count]
    if summary["num_paused"]:
        parts.append(f"{summary['num_paused']} paused")
    parts.append(f"{summary['progress']:.0%} done")
    if summary["tokens_per_s"] is not None:
        parts.append(f"{summary['tokens_per_s']:.0f} tokens/s")
        parts.append(f"{summary['files_per_s']:.2g} files/s")
    if summary["seconds_left"] is not None:
        parts.append(f"{duration(summary['seconds_left'])} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """As a clock shows it: 0:07, 12:30, 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
