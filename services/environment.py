"""Reads what comes from the machine and not from the file: data folder, database, secrets, addresses.

The only place that reads `WINDFARM_*` variables. `windfarm up` sets them for every process that it starts and
`windfarm env` prints them, so that replicas, the command line and a hand-started `serve run` agree.
"""

import ipaddress
from collections.abc import Mapping
from os import environ
from pathlib import Path
from urllib.parse import urlsplit

from cluster.home import DATABASE_FILE, HOME_ENV, default_root
from services.config import Environment, ListenConfig
from services.guardian import GUARDIAN_VARIABLE
from services.setup_errors import ConfigError

SECRET_VARIABLE = "WINDFARM_INTERNAL_SECRET"
INTERNAL_HOST_VARIABLE = "WINDFARM_INTERNAL_HOST"
NAMESPACES_VARIABLE = "WINDFARM_NAMESPACES"
PORTS_VARIABLE = "WINDFARM_PORTS"
LOOPBACK = "127.0.0.1"
# Enough that nobody guesses it: internal ports on the network have nothing else in front of them.
MIN_SECRET_CHARACTERS = 32


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Everything a replica needs to know about its machine; `ConfigError` where a variable is missing or wrong."""
    variables = environ if variables is None else variables
    home = data_folder(variables)
    secret = variables.get(SECRET_VARIABLE, "")
    if not secret:
        raise ConfigError(
            f"{SECRET_VARIABLE} is not set: internal ports would be open. Start with `windfarm up`, or run "
            '`eval "$(windfarm env)"` first.'
        )
    internal_host = _internal_host(variables)
    if not ipaddress.ip_address(internal_host).is_loopback and len(secret) < MIN_SECRET_CHARACTERS:
        raise ConfigError(
            f"{INTERNAL_HOST_VARIABLE}={internal_host} opens internal ports to the network, and {SECRET_VARIABLE} is "
            f"shorter than {MIN_SECRET_CHARACTERS} characters. Make a longer one: `openssl rand -hex 32`."
        )
    return Environment(
        home=home,
        database_url=database_url(variables),
        internal_secret=secret,
        internal_host=internal_host,
        public_namespace=_public_namespace(variables),
        ports=Path(variables[PORTS_VARIABLE]) if variables.get(PORTS_VARIABLE) else None,
        public_url=_url(variables, "WINDFARM_PUBLIC_URL"),
        qdrant_url=_url(variables, "WINDFARM_QDRANT_URL"),
        listen_host=variables.get("WINDFARM_HOST") or None,
        listen_port=_number(variables, "WINDFARM_PORT", 1, 65535),
        threads=_number(variables, "WINDFARM_THREADS", 1, 4096),
    )


def data_folder(variables: Mapping[str, str] | None = None) -> Path:
    """`WINDFARM_HOME`, by default `windfarm` in the user's data directory. Not created here."""
    named = (environ if variables is None else variables).get(HOME_ENV)
    return Path(named).expanduser().absolute() if named else default_root()


def database_url(variables: Mapping[str, str] | None = None) -> str:
    """`WINDFARM_DATABASE_URL`, by default an SQLite file in the data folder."""
    variables = environ if variables is None else variables
    return variables.get("WINDFARM_DATABASE_URL") or f"sqlite:///{data_folder(variables) / DATABASE_FILE}"


def has_elastic_nodes(variables: Mapping[str, str] | None = None) -> bool:
    """`WINDFARM_ELASTIC_NODES=1`: nodes come with demand, so the ones at hand say nothing about what will fit."""
    return (environ if variables is None else variables).get("WINDFARM_ELASTIC_NODES") == "1"


def public_address(listen: ListenConfig, environment: Environment) -> tuple[str, int]:
    """Host and port of the public endpoint: the environment wins over the file."""
    return environment.listen_host or listen.host, environment.listen_port or listen.port


def public_url(listen: ListenConfig, environment: Environment) -> str:
    """Where this machine reaches the public endpoint: itself, unless `WINDFARM_PUBLIC_URL` names another address."""
    return environment.public_url or url_of(*public_address(listen, environment))


def url_of(host: str, port: int) -> str:
    """URL of a listener as seen from this machine, where "all interfaces" is no address to connect to."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _internal_host(variables: Mapping[str, str]) -> str:
    """`WINDFARM_INTERNAL_HOST`, by default loopback. One address of this node: others connect to what it announces."""
    host = variables.get(INTERNAL_HOST_VARIABLE) or LOOPBACK
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigError(f"{INTERNAL_HOST_VARIABLE}={host} is not an IP address. Name one of this node's.") from error
    if address.is_unspecified:
        raise ConfigError(
            f"{INTERNAL_HOST_VARIABLE}={host} means all interfaces; other nodes cannot connect to that. Name the one "
            "address of this node that they reach."
        )
    return host


def _public_namespace(variables: Mapping[str, str]) -> Path | None:
    """That of the guardian, who stays where windfarm was started when its nodes get namespaces of their own."""
    guardian = variables.get(GUARDIAN_VARIABLE)
    if not variables.get(NAMESPACES_VARIABLE) or guardian is None:
        return None
    return Path(f"/proc/{guardian}/ns/net")


def _url(variables: Mapping[str, str], name: str) -> str | None:
    text = variables.get(name)
    if not text:
        return None
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{name}={text} is no URL; expected http://host:port or https://host.")
    return text.rstrip("/")


def _number(variables: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    text = variables.get(name)
    if not text:
        return None
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ConfigError(f"{name}={text} is not a number from {low} to {high}.")
    return int(text)
