"""The running product, started once for all end-to-end tests: `windfarm up` on a data folder and a port of its own.

Tests that end or break something start their own with `start_product`.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.home import default_root
from services.control import ray_folder_of

ROOT = Path(__file__).resolve().parents[1]
WINDFARM = Path(sys.executable).with_name("windfarm")
WATCHED = Path(__file__).with_name("e2e") / "watched"


@dataclass(frozen=True)
class Product:
    """What `windfarm up --json` printed, and where it runs. `api` ends in /v1."""

    ui: str
    api: str
    key: str
    home: Path
    port: int

    @property
    def address(self) -> str:
        return self.ui.rstrip("/")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def run(self, *arguments: str, check: bool = True, typed: str = "") -> "subprocess.CompletedProcess[str]":
        """A `windfarm` command against this product; `typed` is what it reads from its standard input."""
        return windfarm(self.home, arguments, check=check, typed=typed)


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """One product for all tests that leave it as usable as they found it."""
    with start_product(tmp_path_factory.mktemp("product") / "home") as running:
        yield running


@contextmanager
def start_product(home: Path, arguments: Sequence[str] = ()) -> Iterator[Product]:
    """A product on `home`, ended in the end whatever happened."""
    link_models(home)
    port = free_port()
    try:
        up = make_up(home, ["--detach", "--json", "--port", str(port), *arguments])
        if up.returncode:
            pytest.fail(f"make up failed ({up.returncode}):\n{up.stdout}\n{up.stderr}\n{logs(home)}")
        printed = json.loads(up.stdout.splitlines()[-1])
        yield Product(printed["ui"], printed["api"], printed["key"], home, port)
    finally:
        windfarm(home, ["down"], check=False)
        shutil.rmtree(ray_folder_of(home), ignore_errors=True)  # Ray's logs lie outside the data folder


def make_up(home: Path, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """`make up` as people type it, with the environment that the tests run in: it counts as set up (`-o setup`)."""
    make = ["make", "--silent", "-o", "setup", "up", f"BIN={WINDFARM.parent}", f"ARGS={shlex.join(arguments)}"]
    return run(home, make, check=False)


def windfarm(
    home: Path, arguments: Sequence[str], *, check: bool = True, typed: str = ""
) -> "subprocess.CompletedProcess[str]":
    return run(home, [str(WINDFARM), *arguments], check=check, typed=typed)


def run(
    home: Path, command: Sequence[str], *, check: bool, typed: str = "", root: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "WINDFARM_HOME": str(home)} | watched(home)
    return subprocess.run(
        command, cwd=root, env=environment, input=typed, capture_output=True, text=True, check=check, timeout=280
    )


def connections_file(home: Path) -> Path:
    """Where the processes of a product note what they try to reach."""
    return home.with_name(f"{home.name}.connections")


def watched(home: Path) -> dict[str, str]:
    """Variables with which every Python process of the product notes its attempts to reach another machine."""
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(WATCHED), *([before] if before else [])])
    return {"PYTHONPATH": path, "WATCH_CONNECTIONS": str(connections_file(home))}


def link_models(home: Path) -> None:
    """The models that set-up prepared, as hard links where the disk is the same: nothing is copied or converted."""
    prepared = default_root() / "models"
    if prepared.is_dir() and not (home / "models").exists():
        shutil.copytree(prepared, home / "models", copy_function=link_or_copy, ignore=shutil.ignore_patterns(".*"))


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def logs(home: Path) -> str:
    """The end of every log, for the message of a test that failed."""
    files = sorted((home / "logs").rglob("*.log")) if (home / "logs").is_dir() else []
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in files)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
