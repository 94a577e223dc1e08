"""`ingest`, `search`, `collections`, `documents`, `reembed`: what windfarm knows."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption
from services.cli.output import put, put_json, say

if TYPE_CHECKING:
    from services.api_client import ApiClient
    from services.cli.ingest_display import IngestDisplay

FINAL = ("done", "failed", "cancelled")
AHEAD = 8
POLL_S, SPEED_POLL_S = 0.15, 1.0
CollectionArgument = Annotated[str, typer.Argument(help="Name of a collection.")]


@dataclass(frozen=True, slots=True)
class FileResult:
    """What became of one file. `state`: added, unchanged or failed."""

    path: str
    state: str
    chunks: int = 0
    reason: str = ""
    warnings: tuple[str, ...] = ()


def ingest(
    paths: Annotated[list[str], typer.Argument(help="Files, folders that are walked, or http(s) addresses.")],
    collection: Annotated[str, typer.Option("--collection", "-c", help="Where to put them; made when missing.")],
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read files and web pages into a collection. One that cannot be read stops no other; exit code 1 when one failed.

    Web pages are fetched by windfarm itself, from public addresses and those listed under ingestion.web.allowed.
    """
    from services.cli.client import open_client
    from services.cli.ingest_display import IngestDisplay

    urls = [path for path in paths if path.lower().startswith(("http://", "https://"))]
    files: list[tuple[Path | str, str]] = [*find_files([Path(path) for path in paths if path not in urls])]
    files += [(url, url) for url in urls]
    batch = f"ingest_{secrets.token_hex(8)}"
    with open_client(home, api, key) as client, IngestDisplay(len(files), _size_of(files)) as display:
        if any(not isinstance(source, Path) or source.exists() for source, _ in files):  # a slip of the pen makes none
            client.create_collection(collection)
        results = list(_ingest_all(client, collection, files, display, batch))
    failed = [result for result in results if result.state == "failed"]
    if as_json:
        counts = {state: sum(r.state == state for r in results) for state in ("added", "unchanged", "failed")}
        put_json({"collection": collection, "batch": batch, **counts, "files": [asdict(result) for result in results]})
    else:
        _print_summary(collection, results, failed)
    if failed or not results:
        raise typer.Exit(1)


def find_files(paths: list[Path]) -> list[tuple[Path, str]]:
    """(file, name in the collection), each file once. Hidden files are left out.

    Names hold no slashes (the server keeps the last part of a path alone), so the folders below the named one stand
    before the file with another mark: files of the same name stay apart. Where two of several paths would still give
    the same name, nothing is sent: the second would silently replace the first.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for file, name in _files_of(path):
            first = found.setdefault(name, file)
            if first.absolute() != file.absolute() and first.resolve() != file.resolve():
                raise typer.BadParameter(
                    f"{first} and {file} would both be {name!r} in the collection, and the second would replace the "
                    "first. Name the folder that holds both, or use two collections.",
                    param_hint="PATHS",
                )
    return [(file, name) for name, file in found.items()]


def _size_of(files: list[tuple[Path | str, str]]) -> int:
    """Bytes of all files together; addresses, and files that are gone meanwhile, count nothing."""
    num_bytes = 0
    for file, _ in files:
        with contextlib.suppress(OSError):
            num_bytes += file.stat().st_size if isinstance(file, Path) else 0
    return num_bytes


def _files_of(path: Path) -> Iterator[tuple[Path, str]]:
    from rag.filenames import name_of_path

    if not path.is_dir():
        yield path, path.name
        return
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield file, name_of_path(relative.parts)


def _ingest_all(
    client: ApiClient, collection: str, files: list[tuple[Path | str, str]], display: IngestDisplay, batch: str
) -> Iterator[FileResult]:
    """Some files are sent ahead, so that the server always has work; results come in the order of the files."""
    waiting: list[tuple[str, dict[str, Any] | FileResult]] = []
    remaining = iter(files)
    while True:
        while len(waiting) < AHEAD and (following := next(remaining, None)) is not None:
            waiting.append((following[1], _send(client, collection, *following, batch)))
        if not waiting:
            return
        name, job = waiting.pop(0)
        result = job if isinstance(job, FileResult) else _finish(client, name, job, display, batch)
        num_bytes = 0 if isinstance(job, FileResult) else job.get("num_bytes") or 0
        display.finished(name, result.state, result.reason, num_bytes)
        yield result


def _send(client: ApiClient, collection: str, path: Path | str, name: str, batch: str) -> dict[str, Any] | FileResult:
    from services.api_client import ApiFailed

    try:
        if isinstance(path, str):
            return client.add_url(collection, path, batch)
        return client.upload(collection, path, name, batch=batch)
    except OSError as error:
        return FileResult(name, "failed", reason=f"{error.strerror}: {path}")
    except ApiFailed as error:
        if error.status in (0, 401, 403):
            raise  # not a matter of this file
        return FileResult(name, "failed", reason=str(error))


def _finish(
    client: ApiClient, name: str, job: dict[str, Any], display: IngestDisplay, batch: str | None = None
) -> FileResult:
    speed_at = 0.0
    while job["state"] not in FINAL:
        state = "paused" if job.get("paused") else job["state"]
        display.progress(name, state, job.get("progress") or 0.0, job.get("waiting_for"))
        if batch is not None and display.is_shown and time.monotonic() >= speed_at:
            display.speed(client.jobs(batch=batch, limit=0)["summary"])
            speed_at = time.monotonic() + SPEED_POLL_S
        time.sleep(POLL_S)
        job = client.job(job["id"])
    warnings = tuple(job.get("warnings") or ())
    if job["state"] == "done":
        state = "unchanged" if job.get("unchanged") else "added"
        return FileResult(name, state, job.get("num_chunks") or 0, warnings=warnings)
    error = job.get("error") or {}
    return FileResult(name, "failed", reason=str(error.get("message") or job["state"]), warnings=warnings)


def _print_summary(collection: str, results: list[FileResult], failed: list[FileResult]) -> None:
    added = [result for result in results if result.state == "added"]
    unchanged = sum(result.state == "unchanged" for result in results)
    chunks = sum(result.chunks for result in added)
    put(f"{collection}: {len(added)} added ({chunks} passages), {unchanged} unchanged, {len(failed)} failed")
    for result in failed:
        put(f"  failed: {result.path}: {result.reason}")
    if not results:
        say("No files were found.")


def search(
    collection: CollectionArgument,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    top_k: Annotated[int, typer.Option(min=1, max=50, help="Number of passages.")] = 5,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find passages in a collection."""
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        passages = client.search(collection, query, top_k)
    if as_json:
        put_json({"passages": passages})
        return
    for number, passage in enumerate(passages, 1):
        page = f", page {passage['page']}" if passage.get("page") else ""
        put(f"{number}. {passage.get('document')}{page} (score {passage.get('score', 0):.3f})")
        put(f"   {' '.join(str(passage.get('text', '')).split())[:300]}")


def collections(
    delete: Annotated[str | None, typer.Option(help="Delete this collection with all its documents.")] = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List collections, or delete one."""
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        if delete is not None:
            client.delete_collection(delete)
        found = client.collections()
    if as_json:
        put_json({"collections": found})
        return
    for item in found:
        put(f"{item['name']:32} {item.get('num_documents', 0):6} documents  {item.get('embedding_model', '')}")


def documents(
    collection: CollectionArgument,
    delete: Annotated[str | None, typer.Option(help="Delete the document with this id.")] = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the documents of a collection, or delete one."""
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        if delete is not None:
            client.delete_document(collection, delete)
        found = client.documents(collection)
    if as_json:
        put_json({"documents": found})
        return
    for item in found:
        put(f"{item['id']}  {item.get('name') or item.get('filename')}  {item.get('num_chunks', 0)} passages")


def reembed(
    collection: CollectionArgument,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute all vectors of a collection anew with the embedding model that is configured now."""
    from services.api_client import ApiFailed
    from services.cli.client import open_client
    from services.cli.ingest_display import IngestDisplay

    with open_client(home, api, key) as client, IngestDisplay(1) as display:
        answer = client.reembed(collection)
        job = answer.get("job", answer)
        result = _finish(client, collection, job, display) if "state" in job else FileResult(collection, "added")
    if as_json:
        put_json({"collection": collection, "ok": result.state != "failed", "reason": result.reason})
    elif result.state != "failed":
        put(f"{collection}: all vectors are new.")
    if result.state == "failed":
        raise ApiFailed(200, "reembed_failed", f"{collection}: {result.reason}")
