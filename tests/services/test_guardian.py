"""Whatever ends first, the guardian ends the rest: children, and orphans that slipped away from their parents."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from services.guardian import KEEP
from services.processes import INSTANCE_VARIABLE, Process, find_process, tagged

# A conductor that leaves an orphan behind: a grandchild in a session of its own, as engines have them.
CONDUCTOR = """
import subprocess, sys, time
subprocess.run([sys.executable, "-S", "-c", '''
import subprocess, sys
print(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"], start_new_session=True).pid)
'''], start_new_session=True)
sys.stdout.flush()
print("up", flush=True)
time.sleep(120)
"""
GONE_S = 30


@dataclass
class Guarded:
    guardian: "subprocess.Popen[str]"
    starter_pipe: int
    conductor: Process
    orphan: Process

    def is_all_gone(self) -> bool:
        return self.conductor.wait(GONE_S) and self.orphan.wait(GONE_S) and self.guardian.wait(GONE_S) is not None


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    instance = f"test-{os.getpid()}-{os.urandom(4).hex()}"
    reader, writer = os.pipe()
    guardian = subprocess.Popen(
        [sys.executable, "-m", "services.guardian", "--starter-fd", str(reader), "--", sys.executable, "-c", CONDUCTOR],
        env={**os.environ, INSTANCE_VARIABLE: instance},
        stdout=subprocess.PIPE,
        pass_fds=[reader],
        start_new_session=True,
        text=True,
    )
    os.close(reader)
    assert guardian.stdout is not None
    orphan = find_process(int(guardian.stdout.readline()))
    assert guardian.stdout.readline() == "up\n"
    (conductor,) = [p for p in tagged(instance) if p.pid not in (guardian.pid, orphan.pid if orphan else 0)]
    assert orphan is not None
    yield Guarded(guardian, writer, conductor, orphan)
    for process in tagged(instance):
        process.signal(9)
    guardian.wait()


def test_it_ends_all_when_it_is_asked(guarded: Guarded) -> None:
    guarded.guardian.terminate()
    assert guarded.is_all_gone()
    assert guarded.guardian.returncode == 0


def test_it_ends_all_when_the_conductor_dies(guarded: Guarded) -> None:
    guarded.conductor.signal(9)
    assert guarded.is_all_gone()
    assert guarded.guardian.returncode == 1


def test_it_ends_all_when_the_starter_is_gone(guarded: Guarded) -> None:
    os.close(guarded.starter_pipe)
    assert guarded.is_all_gone()


def test_it_goes_on_when_the_starter_said_so(guarded: Guarded) -> None:
    os.write(guarded.starter_pipe, KEEP)
    os.close(guarded.starter_pipe)
    with pytest.raises(subprocess.TimeoutExpired):
        guarded.guardian.wait(1.5)
    assert guarded.orphan.is_alive
