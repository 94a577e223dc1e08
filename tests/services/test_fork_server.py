"""Workers as forks: what the raylet starts gets a process that is what it would have been, only sooner."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray._private import ray_constants, services

from services import ray_worker
from services.code_servers import CodeServers
from services.fork_server import PRELOADED
from services.processes import find_process
from services.ray_worker import CODE_VARIABLE, SOCKET_VARIABLE, wants_an_environment

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
import sys, threading
from services.fork_server import start_fork_server
pid = start_fork_server(sys.argv[1], sys.argv[2:])
print(pid, flush=True)
sys.stdin.read()
"""
PROGRAM = """
import json, os, resource, sys
print(json.dumps({
    "arguments": sys.argv, "name": __name__, "folder": os.getcwd(), "mark": os.environ.get("MARK"),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "parent": os.getppid(), "path": sys.path[0],
    "preloaded": "colorsys" in sys.modules, "pid": os.getpid(), "code": os.environ.get("WINDFARM_CODE"),
    "python_path": os.environ.get("PYTHONPATH"),
}))
print("to stderr", file=sys.stderr)
"""


@contextmanager
def server(path: Path, *modules: str) -> Iterator["tuple[subprocess.Popen[str], int]"]:
    """A process with a fork server, and the server's id."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path), *modules],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        yield owner, int(owner.stdout.readline())
    finally:
        owner.kill()
        owner.communicate()


def program(folder: Path, text: str = PROGRAM) -> Path:
    path = folder / "worker_program.py"
    path.write_text(textwrap.dedent(text))
    return path


def start_worker(path: Path | None, *command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """As a raylet does; returns when all that was started has closed its output."""
    environment = {**os.environ, "MARK": "of the raylet"} | ({SOCKET_VARIABLE: str(path)} if path else {})
    return subprocess.run(
        [sys.executable, ray_worker.__file__, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_a_fork_has_all_that_the_raylet_gave(tmp_path: Path) -> None:
    worker = program(tmp_path)
    with server(tmp_path / "s", "colorsys") as (_, server_pid):
        answer = start_worker(tmp_path / "s", str(worker), "--node-id=7", "a b", cwd=tmp_path)
    told = json.loads(answer.stdout)
    assert told["arguments"] == [str(worker), "--node-id=7", "a b"]
    assert told["name"] == "__main__"
    assert told["folder"] == told["path"] == str(tmp_path)
    assert told["mark"] == "of the raylet"
    assert told["preloaded"]
    assert told["parent"] == server_pid
    assert answer.stderr.strip() == "to stderr"


def test_an_ended_worker_leaves_no_zombie_and_the_server_goes_on(tmp_path: Path) -> None:
    worker = program(tmp_path, PROGRAM + "sys.exit(3)")
    with server(tmp_path / "s") as (_, server_pid):
        pids = [json.loads(start_worker(tmp_path / "s", str(worker), cwd=tmp_path).stdout)["pid"] for _ in range(2)]
        assert len({*pids, server_pid}) == 3
        for pid in pids:
            process = find_process(pid)
            assert process is None or process.wait(20)


def test_what_is_no_request_leaves_the_server_as_it_was(tmp_path: Path) -> None:
    worker = program(tmp_path)
    with server(tmp_path / "s") as (_, server_pid):
        for message in (b"", b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\2[]"):
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(str(tmp_path / "s"))
                other.sendall(message)
                other.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):  # what it had not read
                    assert other.recv(16) == b""
        told = json.loads(start_worker(tmp_path / "s", str(worker), cwd=tmp_path).stdout)
        assert told["parent"] == server_pid


def test_who_has_gone_meanwhile_gets_no_worker(tmp_path: Path) -> None:
    """It has started the worker by itself by then, and a raylet that finds two of one name cannot tell them apart."""
    worker = program(tmp_path, PROGRAM + "open(f'ran-{os.getpid()}', 'w').close()")
    with server(tmp_path / "s") as (_, server_pid):
        os.kill(server_pid, signal.SIGSTOP)
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(tmp_path / "s"))
            request = {"command": [str(worker)], "environment": dict(os.environ), "folder": str(tmp_path), "limits": {}}
            message = json.dumps(request).encode()
            socket.send_fds(other, [len(message).to_bytes(4, "big")], [1, 2])
            other.sendall(message)
        os.kill(server_pid, signal.SIGCONT)
        start_worker(tmp_path / "s", str(worker), cwd=tmp_path)
    assert len(list(tmp_path.glob("ran-*"))) == 1


DRAWING = """
import ray
with open("ids", "a") as file:
    print(ray.ObjectID.from_random().hex(), file=file)
"""


def test_no_two_forks_draw_the_same_ids(tmp_path: Path) -> None:
    """Generators that a fork inherits seeded give the same ids to tasks of different workers: Ray aborts on them."""
    worker = program(tmp_path, PROGRAM + DRAWING)
    with server(tmp_path / "s", *PRELOADED) as (_, server_pid):
        num_workers = len(PRELOADED) + 3  # it imports at least one module between two of them
        answers = [start_worker(tmp_path / "s", str(worker), cwd=tmp_path) for _ in range(num_workers)]
    assert [json.loads(answer.stdout)["parent"] for answer in answers] == [server_pid] * num_workers
    assert len(set((tmp_path / "ids").read_text().split())) == num_workers


def test_forks_that_would_draw_the_same_ids_are_refused(tmp_path: Path) -> None:
    (tmp_path / "seeding.py").write_text("import ray\nray.ObjectID.from_random()\n")
    worker = program(tmp_path, PROGRAM + DRAWING)
    with server(tmp_path / "s", "seeding") as (_, server_pid):
        answers = [start_worker(tmp_path / "s", str(worker), cwd=tmp_path) for _ in range(4)]
    parents = [json.loads(answer.stdout)["parent"] for answer in answers]
    assert parents[0] == server_pid
    assert server_pid not in parents[-2:]  # started as Ray does it
    assert len(set((tmp_path / "ids").read_text().split())) == 4


def test_the_server_ends_with_the_process_that_it_was_forked_from(tmp_path: Path) -> None:
    with server(tmp_path / "s") as (owner, server_pid):
        process = find_process(server_pid)
        assert process is not None
        owner.send_signal(signal.SIGKILL)
        assert process.wait(20)


@pytest.mark.parametrize("is_named", [True, False])
def test_without_a_server_the_worker_starts_by_itself(tmp_path: Path, is_named: bool) -> None:
    worker = program(tmp_path)
    answer = start_worker(tmp_path / "nobody" if is_named else None, str(worker), "x", cwd=tmp_path)
    assert json.loads(answer.stdout)["arguments"] == [str(worker), "x"]
    assert ("without the fork server" in answer.stderr) == is_named


OTHER_CODE = {CODE_VARIABLE: "v2", "PYTHONPATH": os.pathsep.join(["/elsewhere", str(ROOT)])}
WANTS_OTHER_CODE = "--serialized-runtime-env-context=" + json.dumps(
    {"command_prefix": [], "env_vars": OTHER_CODE, "py_executable": sys.executable, "java_jars": []}
)


def test_a_worker_of_other_code_is_no_fork_that_holds_the_modules_of_the_start(tmp_path: Path) -> None:
    worker = program(tmp_path)
    with server(tmp_path / "s", "colorsys") as (_, server_pid):
        told = json.loads(start_worker(tmp_path / "s", WANTS_OTHER_CODE, str(worker), "x", cwd=tmp_path).stdout)
        usual = json.loads(start_worker(tmp_path / "s", str(worker), "x", cwd=tmp_path).stdout)
    assert told["arguments"] == [str(worker), "x"]
    assert (told["code"], told["python_path"]) == ("v2", OTHER_CODE["PYTHONPATH"])
    assert not told["preloaded"]
    assert told["parent"] != server_pid
    assert (usual["parent"], usual["code"]) == (server_pid, None)


def test_other_code_has_a_server_of_its_own_while_an_application_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOCKET_VARIABLE, str(tmp_path / "s"))
    worker, servers = program(tmp_path), CodeServers()
    wanting = threading.Thread(target=servers.want, args=[[{"runtime_env": {"env_vars": OTHER_CODE}}, {}]])
    wanting.start()
    try:
        while wanting.is_alive():
            servers.tend()
            wanting.join(0.05)
        told = json.loads(start_worker(tmp_path / "s", WANTS_OTHER_CODE, str(worker), cwd=tmp_path).stdout)
        own = find_process(told["parent"])
        assert own is not None
        assert own.pid not in (os.getpid(), told["pid"])
        assert (told["code"], told["python_path"]) == ("v2", OTHER_CODE["PYTHONPATH"])
        servers.want([{"runtime_env": None}, {}])
        servers.tend()
        assert own.wait(20)
        assert not list(tmp_path.glob("s*"))
    finally:
        servers.close()


def test_a_worker_with_an_environment_of_its_own_is_left_to_ray() -> None:
    assert not wants_an_environment("{}")
    usual = {"command_prefix": [], "env_vars": {}, "py_executable": sys.executable, "java_jars": []}
    assert not wants_an_environment(json.dumps(usual))
    assert not wants_an_environment(json.dumps(usual | {"env_vars": OTHER_CODE}))
    assert wants_an_environment(json.dumps(usual | {"env_vars": {"A": "b"}}))
    assert wants_an_environment(json.dumps(usual | {"env_vars": {"A": "b"} | OTHER_CODE}))
    assert wants_an_environment(json.dumps(usual | {"py_executable": "/another/python"}))
    assert wants_an_environment(json.dumps(usual | {"command_prefix": ["nice"]}))


def test_the_raylet_runs_our_script() -> None:
    """It leaves out a script of the name of Ray's own where a worker needs no environment of its own."""
    assert ray_constants.SETUP_WORKER_FILENAME not in Path(ray_worker.__file__).name
    with open(services.__file__, encoding="utf-8") as file:
        source = " ".join(file.read().split())
    assert "start_worker_command = ( [ sys.executable, setup_worker_path, ] + _site_flags()" in source


def test_what_workers_share_holds_no_model_library_and_has_one_thread() -> None:
    """Model libraries read how many threads they may have when they are loaded, and some start them."""
    code = f"""
import importlib, sys, threading
for name in {PRELOADED!r}:
    importlib.import_module(name)
print(threading.active_count(), *sorted({{"torch", "vllm", "xllamacpp", "transformers"}} & sys.modules.keys()))
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "1"
