"""A worker's threads spin as the load of the cores during its steps says; a value of the operator stays."""

import os
from typing import Any

import pytest

from cluster.engines import openmp
from cluster.vllm_plugin import governed_spinning
from cluster.vllm_plugin.governed_spinning import StepGovernor


class Governor:
    """Notes what it is told."""

    def __init__(self, num_threads: int = 2) -> None:
        self.told: list[str] = [f"{num_threads} threads"]

    def begin(self) -> None:
        self.told.append("begin")

    def adapt(self) -> None:
        self.told.append("adapt")


def test_what_others_did_while_the_worker_waited_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(governed_spinning.time, "monotonic", lambda: now[0])
    governor = Governor()
    steps = StepGovernor(governor)  # type: ignore[arg-type]
    for pause in (0.0, 0.01, 5.0):
        now[0] += pause
        steps.begin_step()
        now[0] += 1.0  # a long step is no wait
        steps.end_step()
    assert governor.told[1:] == ["begin", "adapt", "adapt", "begin", "adapt"]


@pytest.fixture
def spin(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without a setting of whoever runs the tests."""
    for name in (openmp.SPIN_VARIABLE, openmp.POLICY_VARIABLE):
        monkeypatch.setenv(name, "")  # whatever it is now comes back in the end
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("own", "is_governed"), [(None, True), ("7", False)])
def test_only_the_processes_that_compute_spin_for_long(
    spin: pytest.MonkeyPatch, own: str | None, is_governed: bool
) -> None:
    if own is not None:
        spin.setenv(openmp.SPIN_VARIABLE, own)
    openmp.limit_spinning()
    assert os.environ[openmp.SPIN_VARIABLE] == (own or openmp.FIXED_SPIN_COUNT)
    openmp.let_children_be_governed()
    assert openmp.is_spinning_governed() is is_governed


@pytest.mark.requires("vllm")
def test_every_step_of_a_worker_is_watched_unless_the_operator_has_set_the_spin(spin: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.worker.cpu_worker import CPUWorker

    governors: list[Governor] = []

    def make(num_threads: int) -> Governor:
        governors.append(Governor(num_threads))
        return governors[-1]

    def compute(self: Any, task: str) -> str:
        return f"{task} done"

    spin.setattr(governed_spinning, "SpinGovernor", make)
    spin.setattr(CPUWorker, "execute_model", compute)
    governed_spinning.install()
    assert CPUWorker.execute_model is compute
    openmp.prepare_governed_spinning()
    governed_spinning.install()
    worker = object.__new__(CPUWorker)
    assert [worker.execute_model(task) for task in ("first", "second")] == ["first done", "second done"]
    (governor,) = governors
    assert governor.told == [f"{torch.get_num_threads()} threads", "begin", "adapt", "adapt"]
