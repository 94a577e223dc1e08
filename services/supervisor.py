"""`up` and `down`: starts a windfarm on a data folder, waits until it answers, and ends it.

What runs hangs below a guardian process, which alone ends things; this module starts it, asks it, and checks that it
did its work. A Ray that somebody else runs on the machine is neither joined nor touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from cluster.catalogue import Format, resolve
from cluster.engines.choice import choose_engine, detect_hardware
from cluster.errors import TopologyError
from cluster.home import Home, explain_disk_errors, open_home
from cluster.topology import Topology
from services.code_change import installed_packages, read_locks
from services.code_copies import keep_copy, read_sources, remove_other_copies
from services.control import RunState, ask, ray_folder_of, read_state, remove_state, running_state, write_state
from services.environment import database_url
from services.guardian import KEEP
from services.local_network import NetworkRefused, Seat, delete_network, make_network
from services.local_node import LocalNode
from services.node_layout import (
    Say,
    choose_seats,
    cores_of_node,
    head_labels,
    node_options,
    node_variables,
    planned_topology,
)
from services.placement_check import check_cards, check_ranks
from services.preflight import (
    Finding,
    Machine,
    check_disk,
    check_models,
    check_port,
    check_resources,
    demands,
    explain,
    read_machine,
)
from services.process_environment import full_environment, load_secrets, process_variables, uses_hub
from services.processes import INSTANCE_VARIABLE, Process, end_all, find_process, in_session, tagged
from services.ray_adapter import NodeOptions
from services.ray_config import RayConfig
from services.ray_worker import CODE_VARIABLE, SOCKET_VARIABLE
from services.setup_errors import NotRunning, StartFailed, StartRefused
from services.sharding import is_sharded
from services.start_order import is_placed, submissions
from services.up_options import UpOptions

if TYPE_CHECKING:
    from services.accounts import OwnerKey

POLL_S = 0.2
STOP_S = 30.0

Show = Callable[[Mapping[str, Any]], None]
Prepare = Callable[[RayConfig, Home], None]
"""Makes or fetches the files of all models."""


@dataclass(slots=True)
class Running:
    """A windfarm that was started by this process."""

    home: Home
    state: RunState
    guardian: subprocess.Popen[bytes]
    starter_pipe: int
    """While it is open, the guardian knows that the starter lives."""

    def keep(self) -> None:
        """Let it run on after this process has ended."""
        os.write(self.starter_pipe, KEEP)


def start(options: UpOptions, say: Say, prepare_models: Prepare) -> Running:
    """Check the machine, then start guardian, Ray and Serve; returns as soon as all have been set off."""
    home = open_home(options.home)
    lock = _lock(home)
    try:
        _end_leftovers(home, say)
        machine = read_machine()
        refuse_unless_fit(options, machine)
        prepare_models(options.config, home)
        if uses_hub(options.config):
            refuse_unless_fit(options, machine)  # what was fetched tells more than the hub did
        instance = secrets.token_hex(8)
        seats = choose_seats(options, instance, say)
        nodes = node_options(machine, ray_folder(home), seats, head_labels(machine, options.labels, say))
        plan_where_needed(options.config, home, lambda: planned_topology(nodes))
        try:
            if seats[0].namespace is not None:
                make_network(instance, len(seats))
            return _launch(options, home, nodes, lock, instance, seats)
        except NetworkRefused as error:
            raise StartRefused(f"The nodes can get no networks of their own: {error}. Use --no-namespaces.") from error
        except BaseException:
            delete_network(instance)
            raise
    finally:
        os.close(lock)  # the guardian holds it from now on


def refuse_unless_fit(options: UpOptions, machine: Machine) -> None:
    """Raise `StartRefused` that lists everything that is missing."""
    findings = check_everything(options, machine)
    if not all(finding.is_ok for finding in findings):
        raise StartRefused(explain(findings))


def has_ranks(config: RayConfig) -> bool:
    """Whether a model of the file is cut into ranks."""
    return any(is_sharded(model) for model in config.app.models.values())


def plan_where_needed(config: RayConfig, home: Home, read_nodes: Callable[[], Topology]) -> None:
    """`refuse_unless_planned` where a model is cut into ranks or there are GPUs, unless nobody knows their memory and
    no ranks are planned on them."""
    try:
        topology = read_nodes()
    except TopologyError:
        if has_ranks(config):
            raise
        return
    if has_ranks(config) or topology.has_accelerators:
        refuse_unless_planned(config, home, topology)


def refuse_unless_planned(config: RayConfig, home: Home, topology: Topology) -> None:
    """Plan every model that is cut into ranks or lies on a GPU on these nodes, beside all the rest; raises
    `StartRefused` where one cannot be placed."""
    findings = [*check_cards(config, home, topology), *check_ranks(config, home, topology)]
    if not all(finding.is_ok for finding in findings):
        raise StartRefused(explain(findings))


def check_everything(options: UpOptions, machine: Machine) -> list[Finding]:
    models = list(check_models(options.config, options.home))
    found = [check_port(options.address), check_disk(options.home), *models]
    if all(model.is_ok for model in models):
        cores = options.num_local_nodes * cores_of_node(machine, options.num_local_nodes)
        found += check_resources(
            demands(options.config, options.home), replace(machine, num_cpus=max(machine.num_cpus, cores))
        )
    return found


def models_to_prepare(config: RayConfig) -> list[tuple[str, Format]]:
    """Sources whose files have to be made or fetched before a replica can load them."""
    hardware = detect_hardware()
    wanted: list[tuple[str, Format]] = []
    for model in config.app.models.values():
        choice = choose_engine(resolve(model.source), hardware, model.engine)
        if choice.model_format is not None:
            wanted.append((model.source, choice.model_format))
    wanted.append((config.app.embed.source, resolve(config.app.embed.source).formats[0]))
    return list(dict.fromkeys(wanted))


def prepare_database(running: Running) -> OwnerKey:
    """Bring the database up to date while Ray starts, and return the owner's key; the first start makes both."""
    from services.accounts import Accounts, ensure_owner
    from services.database import Database
    from services.schema import upgrade

    url = database_url({**os.environ, "WINDFARM_HOME": str(running.home.root)})
    upgrade(url)
    database = Database(url)
    try:
        return ensure_owner(Accounts(database), running.home.root)
    finally:
        database.close()


def wait_until_ready(running: Running, options: UpOptions, show: Show, timeout_s: float) -> None:
    """Submit the configuration, then wait for the public endpoint's own word that it is ready."""
    deadline = time.monotonic() + timeout_s
    left = deque(submissions(options.config.serve, options.num_local_nodes))
    latest: dict[str, Any] | None = None
    while time.monotonic() < deadline:
        status = _status(running)
        if left and status.get("phase") == "ready" and (latest is None or is_placed(latest, status)):
            latest = left.popleft()
            ask(running.state.control, {"do": "apply", "config": latest}, timeout_s=60)
            continue
        show(status)
        refuse_failed(status)
        if not left and _platform_runs(status) and is_ready(running.state.api):
            return
        time.sleep(POLL_S)
    raise StartFailed(f"Not ready within {timeout_s:.0f} s. `windfarm status` and `windfarm logs` say what is missing.")


def is_ready(api: str) -> bool:
    """Whether the public endpoint says that it is ready."""
    try:
        return httpx.get(f"{api}/ready", timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def status(home: Path) -> dict[str, Any]:
    """What runs on this data folder, where, and what is pending."""
    state = running_state(home / "run")
    answer = ask(state.control, {"do": "status"})
    return {"api": state.api, "guardian_pid": state.guardian_pid, "is_ready": is_ready(state.api)} | answer


def stop(home: Path) -> None:
    """End the windfarm of this data folder and everything that it started. Raises `NotRunning`."""
    run = home / "run"
    state = read_state(run)
    if state is None:
        raise NotRunning(f"No windfarm runs on {home}.")
    guardian = state.guardian
    if find_process(guardian.pid) == guardian:
        guardian.signal(signal.SIGTERM)
        guardian.wait(STOP_S)
    if survivors := end_all(leftovers_of(state), 2.0):
        pids = ", ".join(str(process.pid) for process in survivors)
        raise StartFailed(f"Processes {pids} cannot be ended; they wait for a disk or a device. Try again later.")
    delete_network(state.instance)
    Path(state.control).unlink(missing_ok=True)
    remove_state(run)


def leftovers_of(state: RunState) -> list[Process]:
    """What is left of a windfarm whose guardian has ended."""
    return list({*tagged(state.instance), *in_session(state.guardian)})


def _lock(home: Home) -> int:
    """An open file that holds the lock of this data folder; whoever inherits it holds it as well."""
    descriptor = os.open(home.run / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        state = read_state(home.run)
        where = f" (process {state.guardian_pid}, at {state.api})" if state else ""
        raise StartRefused(
            f"A windfarm runs on {home.root} already{where}. Use it, end it with `windfarm down`, or start another one "
            "with its own --home and --port."
        ) from None
    return descriptor


def _end_leftovers(home: Home, say: Say) -> None:
    """The lock is ours, so whatever still carries the last run's tag has lost its guardian."""
    state = read_state(home.run)
    if state is None:
        return
    if leftovers := leftovers_of(state):
        say(f"Ending {len(leftovers)} processes that a crash left behind")
        end_all(leftovers, 2.0)
    delete_network(state.instance)
    remove_state(home.run)


def _launch(
    options: UpOptions, home: Home, nodes: Sequence[NodeOptions], lock: int, instance: str, seats: Sequence[Seat]
) -> Running:
    folder = ray_folder_of(home.root)
    control = str(folder / "control.sock")
    host, port = options.address
    sources = read_sources()
    with explain_disk_errors(home.root):
        code = keep_copy(sources, home.run)
    remove_other_copies(home.run, {sources.version})
    variables = process_variables(
        home.root, load_secrets(home.run, renew=True), options.config, settings(options), code
    )
    variables |= {INSTANCE_VARIABLE: instance, "WINDFARM_HOST": host, "WINDFARM_PORT": str(port)}
    variables[CODE_VARIABLE] = sources.version
    variables |= {SOCKET_VARIABLE: str(folder / "fork.sock")}
    variables |= node_variables(seats, nodes, port, options)
    command = ["-m", "services.conductor", "--control", control, "--head", json.dumps(asdict(nodes[0]))]
    for local in map(LocalNode, nodes[1:], seats[1:]):
        command += ["--node", json.dumps(asdict(local))]
    reader, writer = os.pipe()
    guardian = _spawn_guardian(
        seats[0].command([sys.executable, *command]), full_environment(variables), home, lock, reader
    )
    os.close(reader)
    started = find_process(guardian.pid)
    assert started is not None, "a child that was not waited for is there"
    state = RunState(
        instance=instance,
        guardian_pid=guardian.pid,
        guardian_started=started.started,
        control=control,
        host=host,
        port=port,
        config=str(options.config.path),
        ray_folder=str(folder),
        may_use_hub=uses_hub(options.config),
        code=sources.version,
        python_path=variables["PYTHONPATH"],
        locks=read_locks(sources.root),
        packages=installed_packages(),
    )
    write_state(home.run, state)
    return Running(home, state, guardian, writer)


def _spawn_guardian(
    conductor: list[str], environment: dict[str, str], home: Home, lock: int, reader: int
) -> subprocess.Popen[bytes]:
    log = (home.logs / "windfarm.log").open("ab")
    command = [sys.executable, "-m", "services.guardian", "--starter-fd", str(reader), "--", *conductor]
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home.root,
            start_new_session=True,
            pass_fds=[lock, reader],
        )
    finally:
        log.close()


def settings(options: UpOptions) -> dict[str, str]:
    """Command-line options as variables for the processes."""
    given = {"WINDFARM_DATABASE_URL": database_url({**os.environ, "WINDFARM_HOME": str(options.home)})}
    if options.threads is not None:
        given["WINDFARM_THREADS"] = str(options.threads)
    return given


def ray_folder(home: Home) -> Path:
    """Ray's folder, made for its user alone and emptied of all but the last session."""
    folder = ray_folder_of(home.root)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StartRefused(f"{folder} belongs to another user. Delete it, or name another --home.")
    folder.chmod(0o700)
    sessions = sorted(path for path in folder.glob("session_*") if path.is_dir() and not path.is_symlink())
    for session in sessions[:-1]:
        shutil.rmtree(session, ignore_errors=True)
    return folder


def _status(running: Running) -> dict[str, Any]:
    """What the conductor says; before it listens, that it is being started."""
    if running.guardian.poll() is not None:
        raise StartFailed(
            f"Ray did not start. The end of {running.home.logs / 'windfarm.log'}:\n{_log_end(running.home)}"
        )
    try:
        return ask(running.state.control, {"do": "status"})
    except NotRunning:
        return {"phase": "starting"}


def refuse_failed(status: Mapping[str, Any]) -> None:
    """Raise `StartFailed` with the end of what Serve says where an application could not be started."""
    failed = {name: app for name, app in status.get("applications", {}).items() if app["status"] in ("DEPLOY_FAILED",)}
    if failed:
        reasons = "\n".join(f"{name}: {_end_of(app['message'])}" for name, app in failed.items())
        raise StartFailed(f"Could not be started. All of it: `windfarm logs`.\n{reasons}")


def _end_of(message: str, num_lines: int = 8) -> str:
    """The last lines of what Serve says: the error itself stands below its traceback."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return "\n  ".join(lines[-num_lines:])


def _platform_runs(status: Mapping[str, Any]) -> bool:
    """Endpoint and page."""
    platform: Mapping[str, Any] = status.get("applications", {}).get("platform", {})
    return platform.get("status") == "RUNNING"


def _log_end(home: Home, num_lines: int = 12) -> str:
    lines = (home.logs / "windfarm.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-num_lines:])
