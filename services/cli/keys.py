"""`key`: the owner's api keys, new ones, and what each may do. Works on the database, also while windfarm runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.options import HomeOption, JsonOption, home_of
from services.cli.output import put, put_json, say
from services.limits import INHERITED, NO_LIMIT, Limits
from services.setup_errors import ConfigError

if TYPE_CHECKING:
    from services.accounts import Accounts, KeyInfo

_VALUES = "A number, `none` for no limit, or `default` for the value in ray_config.yaml."
_MAX_LIMIT = 2**31 - 1


def key(
    home: HomeOption = None,
    as_json: JsonOption = False,
    new: Annotated[str | None, typer.Option(help="Make another key of the owner, with this name.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List all keys with their ids and limits.")] = False,
    change: Annotated[str | None, typer.Option(metavar="ID", help="Change the limits of the key with this id.")] = None,
    requests_per_minute: Annotated[
        str | None, typer.Option(help=f"Requests that a key begins in 60 seconds. {_VALUES}")
    ] = None,
    tokens_per_minute: Annotated[
        str | None, typer.Option(help=f"Tokens of prompts and answers in 60 seconds. {_VALUES}")
    ] = None,
    concurrent_streams: Annotated[
        str | None, typer.Option(help=f"Answers under way at once, streamed or not. {_VALUES}")
    ] = None,
) -> None:
    """Print the owner's api key; make, list and limit keys. Changes hold within seconds, also where windfarm runs."""
    asked = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_streams": concurrent_streams,
    }
    given = {name: _limit(name, value) for name, value in asked.items() if value is not None}
    if given and new is None and change is None:
        raise ConfigError("Limits belong to one key: add --new NAME or --change ID (`windfarm key --list` shows ids).")
    if sum([new is not None, change is not None, show]) > 1:
        raise ConfigError("--new, --change and --list are three different things; give one of them.")
    if change is not None and not given:
        raise ConfigError("Say what to change: --requests-per-minute, --tokens-per-minute or --concurrent-streams.")
    with _accounts(home) as (accounts, owner_key):
        if show:
            _show(_all_keys(accounts), as_json=as_json)
        elif change is not None:
            _change(accounts, change, given, as_json=as_json)
        elif new is not None:
            _make(accounts, new, Limits(**given), as_json=as_json)
        elif as_json:
            put_json({"key": owner_key})
        else:
            put(owner_key)


@contextmanager
def _accounts(home: Any) -> Iterator[tuple[Accounts, str]]:
    """The accounts of a data folder and its owner's key; both are made where there are none yet."""
    from cluster.home import open_home
    from services.accounts import Accounts, ensure_owner
    from services.database import Database
    from services.environment import database_url
    from services.schema import upgrade

    folder = open_home(home_of(home)).root
    upgrade(database_url())
    database = Database(database_url())
    try:
        accounts = Accounts(database)
        yield accounts, ensure_owner(accounts, folder).key
    finally:
        database.close()


def _all_keys(accounts: Accounts) -> list[KeyInfo]:
    owner = accounts.owner_id()
    assert owner is not None, "the owner was made a moment ago"
    return [info for info in accounts.list_keys(owner) if info.revoked_at is None]


def _make(accounts: Accounts, name: str, limits: Limits, *, as_json: bool) -> None:
    owner = accounts.owner_id()
    assert owner is not None, "the owner was made a moment ago"
    text = accounts.create_key(owner, name, limits)
    made = next(info for info in _all_keys(accounts) if text.startswith(info.prefix))
    if as_json:
        put_json({"key": text, **_json(made)})
        return
    put(text)
    if limits != INHERITED:
        say(f"Its id is {made.id}. {_text(made.limits)}")


def _change(accounts: Accounts, key_id: str, given: dict[str, int | None], *, as_json: bool) -> None:
    known = next((info for info in _all_keys(accounts) if info.id == key_id), None)
    if known is None:
        raise ConfigError(f"There is no key with the id {key_id}. `windfarm key --list` shows all.")
    changed = accounts.limit_key(key_id, Limits(**(asdict(known.limits) | given)))
    if as_json:
        put_json(_json(changed))
    else:
        put(f"{changed.id} {changed.name}: {_text(changed.limits)}")


def _show(infos: list[KeyInfo], *, as_json: bool) -> None:
    if as_json:
        put_json({"keys": [_json(info) for info in infos]})
        return
    for info in infos:
        put(f"{info.id}  {info.prefix}...  {info.name}: {_text(info.limits)}")


def _limit(name: str, value: str) -> int | None:
    """The stored value of an option: None inherits, `NO_LIMIT` lifts."""
    if value == "default":
        return None
    if value == "none":
        return NO_LIMIT
    if value.isascii() and value.isdecimal() and 1 <= int(value) <= _MAX_LIMIT:
        return int(value)
    raise ConfigError(
        f"--{name.replace('_', '-')} is '{value}'. Give a number from 1 to {_MAX_LIMIT}, `none` or `default`."
    )


def _json(info: KeyInfo) -> dict[str, Any]:
    limits = {name: _word(value) for name, value in asdict(info.limits).items()}
    return {"id": info.id, "name": info.name, "prefix": info.prefix, "limits": limits}


def _text(limits: Limits) -> str:
    values = ", ".join(
        f"{field.name.replace('_', ' ')} {_word(getattr(limits, field.name))}" for field in fields(limits)
    )
    return values + "."


def _word(value: int | None) -> int | str:
    return "default" if value is None else "none" if value == NO_LIMIT else value
