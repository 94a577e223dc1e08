"""How long OpenMP threads spin at a barrier before they sleep: llama.cpp and PyTorch both compute with GNU OpenMP.

Spinning is faster on idle cores, by some 5 to 10 percent of a small model's tokens. But as soon as another process
wants a core, the spinning thread burns the time that the thread it waits for needs, some hundred times per token: on
two cores beside one busy process, 3 tokens/s with spinning and 50 without. So the threads of an engine spin while the
cores are ours, and sleep at once while they are not.

The library reads its settings once, when it is loaded. What can be changed later is which of two of them holds: it
spins `GOMP_SPINCOUNT` times while it manages at most as many threads as there are CPUs, and hardly at all with more.
A parked team of threads that never compute makes it "more" (`team.c` and `config/linux/wait.h` of GCC's libgomp).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

SPIN_VARIABLE = "GOMP_SPINCOUNT"
POLICY_VARIABLE = "OMP_WAIT_POLICY"
# A compromise where nobody watches the load of the cores.
FIXED_SPIN_COUNT = "500"
# The library's own default, about 3 ms. With less, threads that wait for an interrupted one fall asleep and have to be
# woken: with 20000 spins (0.2 ms) a stream of a small model was 5 to 10 % slower beside windfarm's own processes.
GOVERNED_SPIN_COUNT = "300000"
SAMPLE_S = 0.25
# Cores that others may use beyond those left over before threads stop spinning, and below which they spin again. Short
# work of many processes (those of windfarm itself take up to 0.4) delays threads little; one busy process takes 1.
CONTENDED_CORES = 0.75
FREE_CORES = 0.6


def limit_spinning() -> None:
    """A short spin, for engines without a governor. Must run before the first library that uses OpenMP is loaded; a
    value set by the operator stays."""
    if is_spinning_governed():  # left by an engine of this process; nobody governs the processes that start from here
        del os.environ[POLICY_VARIABLE], os.environ[SPIN_VARIABLE]
    os.environ.setdefault(SPIN_VARIABLE, FIXED_SPIN_COUNT)


def forbid_spinning() -> None:
    """For engines whose work comes in short bursts beside other processes: two threads that spin were measured to be
    17 times slower there. Must run before the first library that uses OpenMP is loaded; a value set by the operator
    stays."""
    os.environ.setdefault(POLICY_VARIABLE, "PASSIVE")


def prepare_governed_spinning() -> None:
    """Set what `SpinGovernor` needs, before the first library that uses OpenMP is loaded; a policy set by the operator
    stays."""
    if SPIN_VARIABLE not in os.environ and POLICY_VARIABLE not in os.environ:
        os.environ[SPIN_VARIABLE] = GOVERNED_SPIN_COUNT
        os.environ[POLICY_VARIABLE] = "PASSIVE"  # so that "hardly at all" means 100 spins


def let_children_be_governed() -> None:
    """After `limit_spinning`, for processes that start from here and have a governor; a value set by the operator
    stays."""
    if os.environ.get(SPIN_VARIABLE) == FIXED_SPIN_COUNT:
        del os.environ[SPIN_VARIABLE]
        prepare_governed_spinning()


def is_spinning_governed() -> bool:
    return os.environ.get(SPIN_VARIABLE) == GOVERNED_SPIN_COUNT and os.environ.get(POLICY_VARIABLE) == "PASSIVE"


class CpuTimes(NamedTuple):
    """Seconds since some start: of the clock, of all cores in use, of this process."""

    clock_s: float
    machine_s: float
    own_s: float


class SpinGovernor:
    """Lets the threads of one engine in this process spin while no other process wants its cores.

    `adapt` is called from the threads that generate, for every token; it looks at the load a few times a second.
    """

    def __init__(self, num_threads: int, libraries: list[ctypes.CDLL] | None = None) -> None:
        """`num_threads`: those that the engine computes with."""
        self._num_threads = num_threads
        self._libraries = loaded_openmp() if libraries is None else libraries
        self._lock = threading.Lock()
        self._last = read_cpu_times()
        self._next_at = 0.0
        self._parked: list[_ParkedTeam] = []

    @property
    def is_sleeping(self) -> bool:
        """Whether threads sleep at once instead of spinning."""
        return bool(self._parked)

    def begin(self) -> None:
        """An answer begins after a pause: what others did with the cores meanwhile says nothing of now."""
        with self._lock:
            self._last = read_cpu_times()
            self._next_at = self._last.clock_s + SAMPLE_S

    def adapt(self) -> None:
        if not self._libraries or time.monotonic() < self._next_at or not self._lock.acquire(blocking=False):
            return
        try:
            now, last = read_cpu_times(), self._last
            self._last, self._next_at = now, now.clock_s + SAMPLE_S
            if now.clock_s - last.clock_s >= SAMPLE_S:
                others = others_cores(last, now)
                self._let_spin(not is_contended(others, self._num_threads, os.cpu_count() or 1, self.is_sleeping))
        finally:
            self._lock.release()

    def close(self) -> None:
        with self._lock:
            self._libraries = []
            self._let_spin(True)

    def _let_spin(self, is_free: bool) -> None:
        if is_free and self._parked:
            for team in self._parked:
                team.end()
            self._parked = []
        elif not is_free and not self._parked:
            self._parked = [_ParkedTeam(library, self._num_threads) for library in self._libraries]


def read_cpu_times() -> CpuTimes:
    """From the kernel's counters. Time stolen by a hypervisor's other guests does not count: a core that sleeps instead
    of spinning does not bring it back."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:  # no Linux: no governor either
        return CpuTimes(time.monotonic(), 0.0, 0.0)
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, line.split()[1:])
    ticks = user + nice + system + irq + softirq
    return CpuTimes(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


def others_cores(before: CpuTimes, after: CpuTimes) -> float:
    """Cores that other processes kept busy between two readings."""
    used_s = (after.machine_s - before.machine_s) - (after.own_s - before.own_s)
    return max(0.0, used_s / (after.clock_s - before.clock_s))


def is_contended(others: float, num_threads: int, num_cores: int, was_contended: bool) -> bool:
    """Whether others use more cores than the engine leaves them, with a margin against switching to and fro."""
    spare = max(0, num_cores - num_threads)
    return others > spare + (FREE_CORES if was_contended else CONTENDED_CORES)


def loaded_openmp() -> list[ctypes.CDLL]:
    """Every GNU OpenMP library that this process has loaded: a package may bring its own."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}
    libraries = [ctypes.CDLL(path) for path in sorted(paths)]
    return [library for library in libraries if hasattr(library, "GOMP_parallel")]


class _ParkedTeam:
    """As many more OpenMP threads as make the library believe that the CPUs are overcommitted."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        available = len(os.sched_getaffinity(0))
        self._size = max(2, available - num_threads + 2)
        self._library = library
        self._may_end = threading.Event()
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="openmp-parked", daemon=True)
        self._thread.start()
        self._has_begun.wait()

    def _run(self) -> None:
        # Each thread of the team calls free(NULL), which does nothing; the team then sleeps until this thread ends.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        self._library.GOMP_parallel(nothing, None, ctypes.c_uint(self._size), ctypes.c_uint(0))
        self._has_begun.set()
        self._may_end.wait()

    def end(self) -> None:
        self._may_end.set()
        self._thread.join()
