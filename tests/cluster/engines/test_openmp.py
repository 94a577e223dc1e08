"""Threads spin while the cores are ours: the rule, the readings, and llama.cpp beside a process that wants a core."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster.engine import Engine
from cluster.engines import openmp
from cluster.engines.llamacpp import LlamaCppEngine
from cluster.engines.openmp import CpuTimes, SpinGovernor, is_contended, loaded_openmp, others_cores, read_cpu_times
from tests.cluster.engines.conftest import chat, make_local_engine

HOG = "import os\nprint('on', flush=True)\nwhile os.getppid() != 1: pass"


@pytest.mark.parametrize(
    ("others", "num_threads", "num_cores", "was_contended", "expected"),
    [
        (0.7, 2, 2, False, False),
        (0.8, 2, 2, False, True),
        (0.7, 2, 2, True, True),
        (0.5, 2, 2, True, False),
        (2.7, 6, 8, False, False),  # two cores are left for them
        (2.8, 6, 8, False, True),
        (0.8, 8, 4, False, True),  # more threads than cores: none is left over
    ],
)
def test_contention_is_what_others_use_beyond_the_cores_left_to_them(
    others: float, num_threads: int, num_cores: int, was_contended: bool, expected: bool
) -> None:
    assert is_contended(others, num_threads, num_cores, was_contended) is expected


def test_our_own_time_is_not_that_of_others() -> None:
    assert others_cores(CpuTimes(10.0, 100.0, 5.0), CpuTimes(12.0, 103.0, 7.0)) == pytest.approx(0.5)
    assert others_cores(CpuTimes(10.0, 100.0, 5.0), CpuTimes(12.0, 101.99, 7.0)) == 0.0


def test_the_kernel_counts_what_this_process_burns() -> None:
    before = read_cpu_times()
    while read_cpu_times().own_s < before.own_s + 0.1:
        pass
    after = read_cpu_times()
    assert after.clock_s > before.clock_s
    assert after.machine_s >= before.machine_s + 0.05


def test_a_setting_of_the_operator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(openmp.SPIN_VARIABLE, "7")
    monkeypatch.delenv(openmp.POLICY_VARIABLE, raising=False)
    openmp.prepare_governed_spinning()
    assert os.environ[openmp.SPIN_VARIABLE] == "7"
    assert openmp.POLICY_VARIABLE not in os.environ
    assert not openmp.is_spinning_governed()


def test_processes_of_an_engine_without_a_governor_do_not_inherit_the_long_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (openmp.SPIN_VARIABLE, openmp.POLICY_VARIABLE):
        monkeypatch.setenv(name, "")  # whatever it is now comes back in the end
        monkeypatch.delenv(name)
    openmp.prepare_governed_spinning()
    assert openmp.is_spinning_governed()
    openmp.limit_spinning()
    assert os.environ[openmp.SPIN_VARIABLE] == openmp.FIXED_SPIN_COUNT
    assert openmp.POLICY_VARIABLE not in os.environ


def test_what_others_did_in_a_pause_between_answers_says_nothing_of_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = [CpuTimes(0.0, 0.0, 0.0)]
    monkeypatch.setattr(openmp, "read_cpu_times", lambda: times[-1])
    monkeypatch.setattr(openmp.time, "monotonic", lambda: times[-1].clock_s)
    decided: list[bool] = []
    governor = SpinGovernor(2, libraries=loaded_openmp() or [ctypes.CDLL(None)])
    monkeypatch.setattr(governor, "_let_spin", decided.append)
    times.append(CpuTimes(1.0, 2.0, 0.0))  # others took both cores
    governor.begin()
    governor.adapt()
    assert decided == []
    times.append(CpuTimes(1.3, 2.6, 0.6))  # now they are ours
    governor.adapt()
    assert decided == [True]
    times.append(CpuTimes(9.0, 18.0, 4.6))  # one slow token, beside others
    governor.adapt()
    assert decided == [True, False]


def test_without_the_library_nothing_is_done() -> None:
    governor = SpinGovernor(2, libraries=[])
    governor.adapt()
    assert not governor.is_sleeping
    governor.close()


@pytest.mark.integration
async def test_llamacpp_sleeps_beside_a_busy_process_and_answers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (openmp.SPIN_VARIABLE, openmp.POLICY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    engine = make_local_engine("llamacpp")
    assert isinstance(engine, LlamaCppEngine)
    await engine.start()
    try:
        governor = engine._spinning
        assert governor is not None
        alone = await answer(engine)
        with busy_processes(os.cpu_count() or 1):
            while not governor.is_sleeping:
                assert await answer(engine) == alone
            assert await answer(engine) == alone
    finally:
        await engine.stop()
    assert not governor.is_sleeping


async def answer(engine: Engine) -> str:
    return "".join([chunk.text async for chunk in engine.generate(chat("Count to ten.", max_tokens=24, temperature=0))])


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    hogs = [subprocess.Popen([sys.executable, "-c", HOG], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for hog in hogs:
            assert hog.stdout is not None and hog.stdout.readline() == b"on\n"
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.communicate()
