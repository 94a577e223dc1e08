"""A worker's OpenMP threads spin at their barriers while its cores are free of others, and sleep at once while not.

One token of a small model passes some hundred barriers: threads that sleep at each of them cost a lone stream up to a
third of its tokens, threads that spin beside a busy process far more. See `cluster/engines/openmp.py`.
"""

from __future__ import annotations

import time
from typing import Any

from cluster.engines.openmp import SAMPLE_S, SpinGovernor, is_spinning_governed


class StepGovernor:
    """Watches the load of the cores from step to step. Waits between steps say nothing of the steps."""

    def __init__(self, governor: SpinGovernor) -> None:
        self._governor = governor
        self._ended_at = 0.0

    def begin_step(self) -> None:
        if time.monotonic() - self._ended_at > SAMPLE_S:
            self._governor.begin()
        self._governor.adapt()

    def end_step(self) -> None:
        self._ended_at = time.monotonic()


def install() -> None:
    import torch
    from vllm.v1.worker.cpu_worker import CPUWorker

    if not is_spinning_governed():  # the operator has a setting of their own
        return
    original = CPUWorker.execute_model
    governors: list[StepGovernor] = []

    def execute_model(self: Any, *args: Any, **more: Any) -> Any:
        if not governors:  # the number of threads is known once the worker is set up
            governors.append(StepGovernor(SpinGovernor(torch.get_num_threads())))
        governors[0].begin_step()
        try:
            return original(self, *args, **more)
        finally:
            governors[0].end_step()

    CPUWorker.execute_model = execute_model
