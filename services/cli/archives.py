"""`kb export`, `kb import`, `backup`, `restore`: knowledge bases as files. All of it works while windfarm serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption
from services.cli.output import put, put_json
from services.setup_errors import ConfigError

app = typer.Typer(name="kb", help="Move collections between windfarms.", no_args_is_help=True)
TargetArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; it must not exist yet.")]
SourceArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The file to read.", exists=True, dir_okay=False)]


@app.callback()
def kb() -> None:
    """Move collections between windfarms."""


@app.command(name="export")
def export(
    file: TargetArgument,
    collection: Annotated[
        list[str] | None,
        typer.Option("--collection", "-c", help="May be given several times.", show_default="all that you manage"),
    ] = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write collections with documents, files and vectors into one file."""
    _download("/v1/kb/export", file, home, api, key, as_json=as_json, collections=",".join(collection or ()))


@app.command(name="import")
def import_(
    file: SourceArgument,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take over the collections of such a file, all or none, without embedding anything again."""
    answer = _send("/v1/kb/import", file, home, api, key)
    if as_json:
        put_json(answer)
        return
    for entry in answer["collections"]:
        put(f"{entry['name']}: {entry['num_documents']} documents, {entry['num_passages']} passages")


def backup(
    file: TargetArgument,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write everything that people put in into one file: documents, vectors, conversations, users, hashes of keys."""
    _download("/v1/backup", file, home, api, key, as_json=as_json)


def restore(
    file: SourceArgument,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Put everything back to a backup. What came since is gone; the key that asks stays valid."""
    if not yes:
        typer.confirm("Everything that was added since this backup will be gone. Go on?", abort=True)
    answer = _send("/v1/restore", file, home, api, key)
    if as_json:
        put_json(answer)
    else:
        put(f"Restored: {answer['num_collections']} collections, {answer['num_documents']} documents.")


def _download(path: str, file: Path, home: Any, api: Any, key: Any, *, as_json: bool, **query: str) -> None:
    from services.cli.client import open_client

    if file.exists():
        raise ConfigError(f"{file} is there already. Name another file.")
    with open_client(home, api, key) as client:
        num_bytes = client.download(path, file, **query)
    if as_json:
        put_json({"file": str(file), "num_bytes": num_bytes})
    else:
        put(f"{file}: {num_bytes / (1 << 20):.1f} MiB")


def _send(path: str, file: Path, home: Any, api: Any, key: Any) -> dict[str, Any]:
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        return client.send_file(path, file)
