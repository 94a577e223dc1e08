"""Which windfarm a command talks to, and with which key."""

from __future__ import annotations

from pathlib import Path

from services.api_client import ApiClient
from services.cli.options import home_of
from services.control import running_state
from services.setup_errors import ConfigError


def open_client(home: Path | None, api: str | None, key: str | None) -> ApiClient:
    """The address and key that were named, else those of the windfarm that runs on the data folder."""
    folder = home_of(home)
    address = api or running_state(folder / "run").api
    return ApiClient(address, key or _owner_key(folder))


def _owner_key(home: Path) -> str:
    from services.accounts import read_owner_key

    if found := read_owner_key(home):
        return found
    raise ConfigError(f"There is no key in {home}. Give one with --key or WINDFARM_KEY.")
