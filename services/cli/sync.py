"""`windfarm sync`: keeps a collection in step with a folder, a git repository or a website."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from services.cli.options import ApiOption, ConfigOption, HomeOption, JsonOption, KeyOption, config_path_of
from services.cli.output import put, put_json, say

if TYPE_CHECKING:
    from services.api_client import ApiClient
    from services.sync.connector import Connector
    from services.sync.engine import Synchronisation, SyncReport

Kind = Literal["folder", "git", "sitemap"]


def sync(
    place: Annotated[
        str,
        typer.Argument(metavar="DIR|REPOSITORY|WEBSITE", help="A folder, a git repository or a website."),
    ],
    collection: Annotated[str, typer.Option("--collection", "-c", help="What to keep in step; made when missing.")],
    kind: Annotated[str | None, typer.Option(help="folder, git or sitemap.", show_default="by the place")] = None,
    branch: Annotated[str | None, typer.Option(help="Branch of a repository.", show_default="its default")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Pattern of what to leave out, as in .windfarmignore.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until ctrl-C.")] = False,
    interval: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds between two looks.", show_default="2 folder, 300 git, 3600 sitemap"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Delete all documents of the place where it is empty now.")
    ] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a collection in step with a place: new and changed files are read in, those that are gone are deleted.

    Only documents that came from this place are ever deleted. A file that cannot be read stops no other; exit code 1
    when one failed. With --json --watch there is one line for each pass that did something.
    """
    from services.api_client import ApiFailed
    from services.cli.client import open_client
    from services.sync.engine import Synchronisation

    with (
        open_client(home, api, key) as client,
        open_connector(place, kind, branch, ignore or [], config) as connector,
    ):
        if not dry_run:
            client.create_collection(collection)
        at_work = Synchronisation(client, connector, collection, failed_error=ApiFailed, tell=_tell)
        if dry_run:
            _show_plan(client, at_work, collection, as_json)
            return
        if watch:
            _watch(at_work, interval or connector.interval_s, allow_empty, as_json)
            return
        report = at_work.run_once(_batch(), may_empty=allow_empty)
    _put_report(collection, report, as_json)
    if report.problems:
        raise typer.Exit(1)


def open_connector(
    place: str, kind: str | None, branch: str | None, patterns: list[str], config: Path | None
) -> Connector:
    """By the kind of place; what the operator permits stands in the configuration."""
    from services.ray_config import load_ray_config
    from services.sync.folder import FolderConnector
    from services.sync.git import GitConnector
    from services.sync.sitemap import SitemapConnector
    from services.web.pages import open_client

    chosen = kind or kind_of(place)
    if branch is not None and chosen != "git":
        raise typer.BadParameter("Only a git repository has branches.", param_hint="--branch")
    if chosen == "folder":
        return FolderConnector(Path(place), patterns)
    ingestion = load_ray_config(config_path_of(config)).app.store.ingestion
    if chosen == "git":
        return GitConnector(place, ingestion.git_schemes, branch=branch, patterns=patterns)
    if chosen == "sitemap":
        return SitemapConnector(place, lambda: open_client(ingestion.web, ingestion.max_file_mib), patterns=patterns)
    raise typer.BadParameter(f"{chosen!r} is not folder, git or sitemap.", param_hint="--kind")


def kind_of(place: str) -> Kind:
    """A folder unless it looks like an address; an address is a repository where it says so, else a website."""
    if place.startswith(("git+", "ssh://", "git@", "file://")) or place.endswith(".git"):
        return "git"
    return "sitemap" if place.startswith(("http://", "https://")) else "folder"


def _batch() -> str:
    return f"sync_{secrets.token_hex(8)}"


def _tell(state: str, name: str, reason: str) -> None:
    say(f"{state:10} {name}{': ' + reason if reason else ''}")


def _watch(at_work: Synchronisation, interval_s: float, allow_empty: bool, as_json: bool) -> None:
    """Pass after pass. What fails for all of it (the place or windfarm is away) is said once, and tried again."""
    from services.api_client import ApiFailed
    from services.sync.connector import ConnectorError

    trouble = None
    while True:
        try:
            report = at_work.run_once(_batch(), may_empty=allow_empty)
            if as_json and (report.new or report.changed or report.removed or report.problems):
                put_json(_report_json(report), one_line=True)
            trouble = None
        except (ConnectorError, ApiFailed) as error:
            if isinstance(error, ApiFailed) and error.status in (401, 403):
                raise
            if str(error) != trouble:
                say(f"waiting    {error}")
            trouble = str(error)
        time.sleep(interval_s)


def _show_plan(client: ApiClient, at_work: Synchronisation, collection: str, as_json: bool) -> None:
    if all(each["name"] != collection for each in client.collections()):
        plan, skipped = at_work.plan_for_nothing()
    else:
        plan, skipped = at_work.plan()
    names = {
        "new": [item.name for item in plan.new],
        "changed": [item.name for item in plan.changed],
        "removed": [str(document["name"]) for document in plan.removed],
        "skipped": [f"{each.name}: {each.reason}" for each in (*skipped, *plan.conflicts)],
    }
    if as_json:
        put_json({"collection": collection, "dry_run": True, "unchanged": len(plan.unchanged), **names})
        return
    for state, those in names.items():
        for name in those:
            put(f"{state:10} {name}")
    put(f"{collection}: {_counts(names, len(plan.unchanged))}; nothing was done (--dry-run)")


def _put_report(collection: str, report: SyncReport, as_json: bool) -> None:
    if as_json:
        put_json({"collection": collection} | _report_json(report))
        return
    for each in report.skipped:
        say(f"skipped    {each.name}: {each.reason}")
    names = {"new": report.new, "changed": report.changed, "removed": report.removed}
    put(f"{collection}: {_counts(names, report.num_unchanged)}, {len(report.problems)} failed")


def _report_json(report: SyncReport) -> dict[str, Any]:
    return {
        "new": report.new,
        "changed": report.changed,
        "removed": report.removed,
        "unchanged": report.num_unchanged,
        "skipped": [{"name": each.name, "reason": each.reason} for each in report.skipped],
        "failed": [{"name": each.name, "reason": each.reason} for each in report.problems],
    }


def _counts(names: dict[str, list[str]], num_unchanged: int) -> str:
    counted = [f"{len(names[state])} {state}" for state in ("new", "changed", "removed")]
    return ", ".join([*counted, f"{num_unchanged} unchanged"])
