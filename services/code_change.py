"""What a change of code needs: how Serve is told of it, and what of it cannot be brought to a running windfarm.

Decides on plain values and files; nothing is started here, and nothing is submitted.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.home import MIGRATIONS, Home, read_version
from services.code_copies import Sources, copies
from services.control import RunState
from services.ray_worker import CODE_VARIABLE
from services.setup_errors import StartRefused

LOCKS = ("requirements/base.lock", "requirements/cpu.lock", "requirements/gpu.lock")
SCHEMA_STEPS = "services/migrations/versions/"
START_ANEW = "End this windfarm and start it with the new code: windfarm down, then make up."
LASTING = (
    "cluster/autoscaling.py",
    "cluster/zones.py",
    "services/beats.py",
    "services/code_servers.py",
    "services/conductor.py",
    "services/control.py",
    "services/fork_server.py",
    "services/gang_loss.py",
    "services/gang_tracker.py",
    "services/guardian.py",
    "services/limit_book.py",
    "services/limiter.py",
    "services/local_network.py",
    "services/local_node.py",
    "services/processes.py",
    "services/public_port.py",
    "services/ray_adapter.py",
    "services/ray_status.py",
    "services/ray_worker.py",
    "services/scaling_view.py",
    "services/zone_scheduler.py",
)
"""Modules of processes that last until `down`: guardian, conductor, nodes, limiter, Serve's controller."""


def with_code(config: Mapping[str, Any], sources: Sources, state: RunState) -> dict[str, Any]:
    """The Serve config with which every application runs this code: Serve hashes `runtime_env` into the version.

    The code of the start needs no word in it: the processes have it already, and the version stays what it was.
    """
    if sources.version == state.code:
        return dict(config)
    parts = state.python_path.split(os.pathsep)
    before, after = parts[0], str(Path(parts[0]).with_name(sources.version))
    path = os.pathsep.join(
        after + part.removeprefix(before) if part == before or part.startswith(before + os.sep) else part
        for part in parts
    )
    variables = {"PYTHONPATH": path, CODE_VARIABLE: sources.version}
    return {**config, "applications": [_with_variables(app, variables) for app in config["applications"]]}


def _with_variables(app: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    environment = app.get("runtime_env") or {}
    given = environment.get("env_vars") or {}
    return {**app, "runtime_env": {**environment, "env_vars": {**given, **variables}}}


def code_of(app: Mapping[str, Any], start: str) -> str:
    """The version of the code that an entry of `applications` runs; `start` is that of `up`."""
    variables = (app.get("runtime_env") or {}).get("env_vars") or {}
    return str(variables.get(CODE_VARIABLE, start))


def refuse_what_cannot_roll(state: RunState, sources: Sources, home: Home) -> None:
    """Raises `StartRefused` where old and new replicas could not live side by side, with the next step."""
    if not state.code:
        raise StartRefused(f"This windfarm was started by a version that cannot change its code. {START_ANEW}")
    if changed := sorted(set(state.packages) - set(installed_packages())):
        raise StartRefused(f"Installed packages are no longer those of the start: {_some(changed)}. {START_ANEW}")
    if sources.version == state.code:
        return
    if read_locks(sources.root) != state.locks:
        raise StartRefused(f"The code pins other packages (requirements/*.lock) than those that run. {START_ANEW}")
    if steps := sorted(_schema_steps(sources.files) ^ _schema_steps(_names_of_copy(home.run, state.code))):
        raise StartRefused(
            f"The code has another database schema ({_some(steps)}), which replicas of the present code cannot use. "
            f"{START_ANEW}"
        )
    if read_version(home) != MIGRATIONS[-1].version:
        raise StartRefused(f"The code has another layout of the data folder. {START_ANEW}")


def lasting_changes(state: RunState, sources: Sources, run: Path) -> list[str]:
    """Changed modules that also run in processes which no change replaces."""
    before = copies(run) / state.code
    return [name for name in LASTING if _read(before / name) != sources.files.get(name)]


def read_locks(root: Path) -> str:
    """Hash of what is pinned."""
    state = hashlib.sha256()
    for name in LOCKS:
        state.update(_read(root / name) or b"")
    return state.hexdigest()


def installed_packages() -> list[str]:
    """`name-version` of everything in this environment. Packages that are added to it later disturb nobody."""
    folders = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    return sorted({path.stem for folder in folders for path in folder.glob("*.dist-info")})


def _schema_steps(names: Iterable[str]) -> set[str]:
    return {name.removeprefix(SCHEMA_STEPS) for name in names if name.startswith(SCHEMA_STEPS)}


def _names_of_copy(run: Path, version: str) -> Iterator[str]:
    folder = copies(run) / version
    return (path.relative_to(folder).as_posix() for path in (folder / SCHEMA_STEPS).glob("*.py"))


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
