"""Only our own processes are found and ended: descendants, and processes with the tag of one instance."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.processes import INSTANCE_VARIABLE, Process, descendants, end_all, find_process, tagged

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
