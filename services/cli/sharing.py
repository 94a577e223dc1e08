"""`share`, `delete`, `receipts`: who may read what, and what is gone."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption
from services.cli.output import put, put_json
from services.setup_errors import ConfigError

CollectionArgument = Annotated[str, typer.Argument(help="Name or id of a collection.")]


def share(
    collection: CollectionArgument,
    document: Annotated[
        str | None, typer.Option(metavar="ID", help="Of this document alone (`windfarm documents` lists ids).")
    ] = None,
    user: Annotated[list[str] | None, typer.Option(help="Let this user read. May be given several times.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="Let this group read.")] = None,
    everybody: Annotated[bool, typer.Option("--everybody", help="Let all users of the tenant read.")] = False,
    not_user: Annotated[list[str] | None, typer.Option(help="Let this user read no more.")] = None,
    not_group: Annotated[list[str] | None, typer.Option(help="Let this group read no more.")] = None,
    not_everybody: Annotated[
        bool, typer.Option("--not-everybody", help="Let those read no more who are not named.")
    ] = False,
    only: Annotated[bool, typer.Option("--only", help="Let nobody else read; alone: nobody at all.")] = False,
    inherit: Annotated[bool, typer.Option("--inherit", help="Of a document: those of its collection again.")] = False,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show and change who may read a collection or one of its documents. Owner and administrators always may.

    A document has the readers of its collection until it gets its own. A change holds for every search that begins
    after it.
    """
    from services.cli.client import open_client

    more = {"users": user or [], "groups": group or [], "everybody": everybody}
    fewer = {"users": not_user or [], "groups": not_group or [], "everybody": not_everybody}
    changes_more, changes_fewer = any(more.values()), any(fewer.values())
    if only and changes_fewer:
        raise ConfigError("--only says who may read; nobody is left to take away with --not-user and the like.")
    if inherit and (only or changes_more or changes_fewer):
        raise ConfigError("--inherit stands alone: the document then has no readers of its own.")
    if inherit and document is None:
        raise ConfigError("--inherit is for a document: add --document ID.")
    path = _collection(collection) + (f"/documents/{quote(document, safe='')}" if document else "") + "/readers"
    with open_client(home, api, key) as client:
        if inherit:
            readers = client.request("PUT", path, {"inherit": True})
        elif only:
            readers = client.request("PUT", path, more)
        elif changes_more or changes_fewer:
            readers = client.request("PATCH", path, {"add": more, "remove": fewer})
        else:
            readers = client.request("GET", path)
    if as_json:
        put_json(readers)
    else:
        put(_readers_line(readers))


def delete(
    collection: CollectionArgument,
    document: Annotated[
        str | None, typer.Argument(metavar="[DOCUMENT]", help="Id of a document; without it the whole collection goes.")
    ] = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a document or a collection, and print the receipt: what was removed, and what a look for it found."""
    from services.cli.client import open_client

    path = _collection(collection) + (f"/documents/{quote(document, safe='')}" if document else "")
    with open_client(home, api, key) as client:
        receipt = client.request("DELETE", path)
    _show_receipt(receipt, as_json=as_json)


def receipts(
    receipt: Annotated[str | None, typer.Argument(metavar="[RECEIPT]", help="Id of one receipt.")] = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the receipts of what was deleted."""
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        if receipt is not None:
            _show_receipt(client.request("GET", f"/v1/receipts/{quote(receipt, safe='')}"), as_json=as_json)
            return
        found = client.request("GET", "/v1/receipts")["data"]
    if as_json:
        put_json({"receipts": found})
        return
    for each in found:
        put(f"{each['receipt_id']}  {_receipt_line(each)}")


def _show_receipt(receipt: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        put_json(receipt)
        return
    removed, check = receipt["removed"], receipt["self_check"]
    put(f"{_receipt_line(receipt)} Receipt {receipt['receipt_id']}.")
    counts = [f"{receipt['num_documents']} documents", f"{receipt['num_versions']} versions"]
    counts += [f"{removed[name]} {label}" for name, label in _COUNTED.items() if name in removed]
    put(f"  removed: {', '.join(counts)}")
    if kept := removed.get("files_kept"):
        put(f"  kept: {', '.join(kept)} in /v1/files, which whoever uploaded them deletes there")
    if check is not None:
        found = ", ".join(f"{check[name]} {label}" for name, label in _LOOKED_FOR.items())
        put(f"  found afterwards: {found} (of {check['num_searches']} searches for it)")


_COUNTED = {
    "points": "passages",
    "words": "words",
    "word_entries": "word entries",
    "indexes": "indexes",
    "jobs": "jobs",
    "uploads": "uploads",
    "answers": "answers in conversations",
}
_LOOKED_FOR = {
    "points": "passages",
    "rows": "rows",
    "answers": "answers",
    "uploads": "uploads",
    "search_hits": "hits",
}


def _receipt_line(receipt: dict[str, Any]) -> str:
    check = receipt["self_check"]
    state = "not checked yet" if check is None else "nothing is left" if check["is_clean"] else "SOMETHING IS LEFT"
    return f"{receipt['object'].removesuffix('.deleted')} {receipt['name']!r} is deleted: {state}."


def _readers_line(readers: dict[str, Any]) -> str:
    names = ["everybody"] if readers["everybody"] else []
    names += [f"group {group['name']}" for group in readers["groups"]]
    names += [f"user {user['name']}" for user in readers["users"]]
    whose = "of its collection" if readers.get("inherited") else ""
    what = f"Document {readers['document_id']}" if "document_id" in readers else f"Collection {readers['collection']!r}"
    told = ", ".join(names) or "its owner and administrators alone"
    return f"{what} is read by {told}{f' (readers {whose})' if whose else ''}."


def _collection(name: str) -> str:
    return f"/v1/collections/{quote(name, safe='')}"
