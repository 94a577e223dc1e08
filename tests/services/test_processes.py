"""Only our own processes are found and ended: descendants, and processes with the tag of one instance."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.processes import INSTANCE_VARIABLE, Process, descendants, end_all, find_process, in_session, tagged

SLEEP = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('set', flush=True); time.sleep(60)"
)


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[bytes]"]]:
    children: list[subprocess.Popen[bytes]] = []
    yield children
    for child in children:
        child.kill()
        child.wait()


def start(started: list["subprocess.Popen[bytes]"], program: str, tag: str | None = None) -> Process:
    environment = {**os.environ, **({INSTANCE_VARIABLE: tag} if tag else {})}
    child = subprocess.Popen([sys.executable, "-S", "-c", program], env=environment, stdout=subprocess.PIPE)
    started.append(child)
    found = find_process(child.pid)
    assert found is not None
    return found


def test_a_process_whose_starter_has_gone_before_it_could_bind_itself_ends() -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    program = f"from services.processes import end_with_parent; end_with_parent({ended.pid}); {SLEEP}"
    assert subprocess.run([sys.executable, "-c", program], timeout=50, check=False).returncode == 1


def test_a_child_is_a_descendant(started: list["subprocess.Popen[bytes]"]) -> None:
    assert start(started, SLEEP) in descendants(os.getpid())


def test_the_tag_finds_exactly_its_own_instance(started: list["subprocess.Popen[bytes]"]) -> None:
    ours, _other, _plain = (start(started, "print('up', flush=True);" + SLEEP, tag) for tag in ("abc", "abcd", None))
    for child in started:
        assert child.stdout is not None
        child.stdout.readline()
    assert tagged("abc") == [ours]


def test_ending_waits_until_all_are_gone(started: list["subprocess.Popen[bytes]"]) -> None:
    ours = [start(started, SLEEP) for _ in range(3)]
    assert end_all(ours, 10) == []
    assert not any(process.is_alive for process in ours)


def test_a_process_that_ignores_the_request_is_killed(started: list["subprocess.Popen[bytes]"]) -> None:
    stubborn = start(started, STUBBORN)
    assert started[0].stdout is not None
    started[0].stdout.readline()
    assert end_all([stubborn], 0.1) == []
    assert not stubborn.is_alive


def test_a_reused_id_is_not_mistaken_for_the_process(started: list["subprocess.Popen[bytes]"]) -> None:
    real = start(started, SLEEP)
    impostor = Process(real.pid, real.started - 1)
    assert not impostor.is_alive
    impostor.signal(9)
    assert real.is_alive


# Its first thread ends alone, as `pthread_exit` in `main` does; the other goes on.
HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("up", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_ended_is_still_found_and_ended(started: list["subprocess.Popen[bytes]"]) -> None:
    headless = start(started, HEADLESS)
    assert started[0].stdout is not None
    started[0].stdout.readline()
    assert headless in descendants(os.getpid())
    assert end_all([headless], 0.1) == []
    assert not headless.is_alive


# Opens a session, leaves a child in it and ends.
LEADER = """
import os, subprocess, sys
print(os.getpid(), subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]).pid, flush=True)
sys.stdin.readline()
"""


def test_members_of_a_session_are_found_after_its_leader_has_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", LEADER],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        leader, child = (find_process(int(pid)) for pid in program.stdout.readline().split())
        assert leader is not None
        assert child is not None
        program.stdin.write("end\n")
        program.stdin.flush()
        program.wait()
        assert in_session(leader) == [child]
        assert end_all([child], 5) == []


def test_a_session_whose_number_belongs_to_another_process_now_is_left_alone(
    started: list["subprocess.Popen[bytes]"],
) -> None:
    real = start(started, SLEEP)
    assert in_session(Process(real.pid, real.started - 1)) == []
