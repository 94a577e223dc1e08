"""Set-up from an empty clone to a product that can start: environment, packages, models. Standard library only.

    make setup                  what `make up` needs
    make setup-dev              also what `make test` needs
    PROFILE=base|cpu|gpu        forces a profile; otherwise the best one that this machine can have

Profiles: `gpu` has vLLM with CUDA, `cpu` has vLLM without it, `base` has no vLLM (llama.cpp serves chat).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from infra.setup import checks, compiler
from infra.setup.checks import SetupProblem
from infra.setup.chromium import find_chromium, install_chromium
from infra.setup.install import Environment
from infra.setup.progress import Progress
from infra.setup.stamp import Stamp, read_stamp, remove_stamp, wanted_stamp, write_stamp

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("tiny", "embed")
"""Models that come along; each leaves a manifest in the data folder when it is wholly prepared."""
COMPILED = (
    *("ray", "gradio", "fastapi", "starlette", "pydantic", "sqlalchemy", "aiohttp", "langchain_core", "rich"),
    *("pygments", "google", "opentelemetry", "alembic", "requests", "urllib3", "httpx", "httpcore", "numpy", "click"),
    *("grpc", "yaml", "filelock", "uvicorn", "anyio", "jinja2", "prometheus_client", "h2"),
)
"""What every start imports. The rest is compiled when it is first imported: all of it would take a minute."""
COMPILED_FOR_TESTS = ("torch", "vllm", "sympy", "transformers")
"""What the dozens of vLLM processes of the tests import, also where Python is told to write no bytecode by itself."""
LEFT_OUT = r"/torch/testing/|/transformers/models/(?!auto/|llama/|mistral/|mixtral/)"
"""Never imported; among them are files for other versions of Python, which cannot be compiled."""
NO_VLLM = (
    "No build of torch without CUDA could be had ({pin}), and there is no GPU: installed without vLLM. "
    "llama.cpp serves chat, everything else works. `PROFILE=cpu make setup` tries again."
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make setup", description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    options = parser.parse_args(arguments)
    try:
        asked = read_profile(os.environ.get("PROFILE", "auto"))
        set_up(asked, dev=options.dev, home=data_folder())
    except SetupProblem as problem:
        sys.stderr.write(f"\nSet-up stopped: {problem}\nWhat to do: {problem.fix}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nSet-up was interrupted. Run it again: it goes on where it stopped.\n")
        return 130
    return 0


def read_profile(text: str) -> str:
    if text not in ("auto", *checks.FREE_GIB):
        raise SetupProblem(f"PROFILE={text} is no profile.", "Choose auto, base, cpu or gpu.")
    return text


def data_folder() -> Path:
    """Where models are prepared; the same rule as the product's own."""
    if named := os.environ.get("WINDFARM_HOME"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser().absolute() / "windfarm"


def set_up(asked: str, *, dev: bool, home: Path, root: Path = ROOT) -> None:
    """Everything that is not there yet. Returns at once where the last set-up still holds."""
    has_gpu = checks.has_gpu()
    wanted = wanted_stamp(root, asked, dev=dev, home=home, has_gpu=has_gpu)
    venv = root / ".venv"
    if is_done(venv, wanted):
        return
    checks.check_writable(root)
    with only_one(venv):
        if is_done(venv, wanted):
            return
        profile = install(root, wanted, guess_profile(asked, has_gpu))
        write_stamp(venv, replace(wanted, profile=profile))


def is_done(venv: Path, wanted: Stamp) -> bool:
    stamp = read_stamp(venv)
    programs_exist = (venv / "bin" / "python").exists() and (venv / "bin" / "windfarm").exists()
    models_exist = all(any(Path(wanted.home).glob(f"models/{name}/*/manifest.json")) for name in MODELS)
    return stamp is not None and stamp.covers(wanted) and programs_exist and models_exist


def guess_profile(asked: str, has_gpu: bool) -> str:
    """The profile to try first."""
    if asked != "auto":
        return asked
    return "gpu" if has_gpu else "cpu"


def install(root: Path, wanted: Stamp, profile: str) -> str:
    """Go through all steps; the profile that was installed in the end."""
    dev = wanted.dev_key is not None
    venv = root / ".venv"
    progress = Progress(num_steps=6 if dev else 5)
    progress.step("Checking this machine")
    python = check_machine(root, profile, Path(wanted.home))

    progress.step(f"Virtual environment in {venv.name} ({python})")
    previous = read_stamp(venv)
    remove_stamp(venv)
    environment = Environment(root, progress.detail)
    environment.create(python)

    progress.step("Packages: torch, vLLM, Ray and what they need" if profile != "base" else "Packages: Ray and more")
    profile = install_packages(environment, wanted, profile, progress, previous)
    environment.install_project()
    environment.compile(COMPILED)
    if dev and profile != "base":
        environment.compile(COMPILED_FOR_TESTS, left_out=LEFT_OUT)

    progress.step(f"Models in {wanted.home}")
    environment.run_module(["cluster.weights", "prepare"])
    if dev:
        progress.step("Browser for the tests")
        prepare_browser(progress)
    progress.step(f"Ready (profile {profile})")
    return profile


def check_machine(root: Path, profile: str, home: Path) -> str:
    """The interpreter to use, once everything needed was seen to be there."""
    python = checks.choose_python()
    checks.check_venv_module(python)
    if profile == "gpu" and (problem := compiler.missing(python)) is not None:
        raise SetupProblem(*problem)
    if not (root / ".venv" / "bin" / "windfarm").exists():
        checks.check_disk(root, checks.FREE_GIB[profile], f"the environment (profile {profile})")
    if not (home / "models").is_dir():
        checks.check_disk(home, 1.0, "the data folder with the bundled models")
    return python


def install_packages(
    environment: Environment, wanted: Stamp, profile: str, progress: Progress, previous: Stamp | None
) -> str:
    """Install the profile's lock; where `auto` cannot have the CPU profile, the base one, and say so."""
    torch_pin = pinned("torch", environment.root / "requirements" / "cpu.lock")
    if profile == "cpu" and not environment.install_torch_for_cpu(torch_pin):
        if wanted.asked == "cpu":
            raise SetupProblem(
                f"No index that can be reached has {torch_pin} for this Python.",
                "Name one with PIP_EXTRA_INDEX_URL, or run PROFILE=base make setup to do without vLLM.",
            )
        progress.note(NO_VLLM.format(pin=torch_pin))
        profile = "base"
    if previous is not None and previous.profile != profile:
        progress.note(f"Packages of the profile {previous.profile} stay installed; `make clean` removes them.")
    environment.install_lock([profile, "dev"] if wanted.dev_key is not None else [profile])
    return profile


def pinned(name: str, lock: Path) -> str:
    """`name==version` as the lock has it, without marker."""
    return next(line.split(";")[0].strip() for line in lock.read_text().splitlines() if line.startswith(f"{name}=="))


def prepare_browser(progress: Progress) -> None:
    if find_chromium() is not None:
        return
    problem = install_chromium(progress.detail)
    if problem:
        progress.note(f"No Chromium: the browser tests are left out. {problem}")


@contextmanager
def only_one(venv: Path) -> Iterator[None]:
    """Two set-ups in one clone wait for each other."""
    venv.mkdir(exist_ok=True)
    with (venv / "setup.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
