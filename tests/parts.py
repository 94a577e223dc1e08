"""Parts of a machine that some tests need, each with a quick look whether it is there."""

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from infra.setup.chromium import find_chromium
from services.haproxy import find_haproxy
from services.local_network import why_no_network
from services.resources import count_gpus
from services.setup_errors import SetupError

DEBIANS_POSTGRES = Path("/usr/lib/postgresql")
"""Each version has its own folder `<version>/bin` here, and Debian puts no link into the PATH."""


def why_missing(part: str) -> str | None:
    """None where the part is there, otherwise what is missing and how to get it."""
    return PARTS[part]()


@functools.cache
def chromium() -> str | None:
    return None if find_chromium() else "no Chromium that starts (`sudo apt-get install chromium`)"


@functools.cache
def vllm() -> str | None:
    return (
        None if importlib.util.find_spec("vllm") else "the profile without vLLM is installed (`PROFILE=cpu make setup`)"
    )


@functools.cache
def gpu() -> str | None:
    return None if count_gpus() else "no NVIDIA GPU"


@functools.cache
def tmpfs() -> str | None:
    """Mounting a small file system, to fill it or to make it read-only: root ignores modes."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "only root may mount a small file system"
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    answer = subprocess.run(probe, capture_output=True, text=True, check=False)
    return None if answer.returncode == 0 else f"mounting is refused here ({answer.stderr.strip()})"


@functools.cache
def namespaces() -> str | None:
    """Networks of their own for several nodes on one machine."""
    return why_no_network()


@functools.cache
def postgres() -> str | None:
    if find_postgres("postgres") and find_postgres("initdb"):
        return None
    return "no PostgreSQL server (`sudo apt-get install postgresql`)"


def find_postgres(name: str, debian: Path = DEBIANS_POSTGRES) -> str | None:
    """Path of a program of PostgreSQL's server, the newest one of Debian's where the PATH has none."""
    if (found := shutil.which(name)) is not None:
        return found
    versions = sorted(debian.glob(f"*/bin/{name}"), key=lambda path: _number(path.parts[-3]))
    return str(versions[-1]) if versions else None


def _number(version: str) -> float:
    return float(version) if version.replace(".", "", 1).isdecimal() else 0.0


@functools.cache
def haproxy() -> str | None:
    try:
        return None if find_haproxy() else "no HAProxy"
    except SetupError as error:
        return str(error)


@functools.cache
def git() -> str | None:
    return None if shutil.which("git") else "no git"


PARTS: dict[str, Callable[[], str | None]] = {
    "chromium": chromium,
    "haproxy": haproxy,
    "vllm": vllm,
    "gpu": gpu,
    "tmpfs": tmpfs,
    "git": git,
    "postgres": postgres,
    "namespaces": namespaces,
}
