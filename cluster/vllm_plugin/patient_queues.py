"""vLLM's processes sleep while they wait for each other, instead of spinning on a core that computes.

Each engine has a process that schedules and one or more that compute; they talk through shared memory and spin for a
second before they wait for a signal. With a core for everybody that saves some microseconds per step. Where there are
as many cores as computing processes the scheduler's spinning takes a third of them away.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    original = shm_broadcast.SpinCondition.__init__

    def init(self: Any, is_reader: bool, context: Any, notify_address: str, busy_loop_s: float = 1) -> None:
        del busy_loop_s
        original(self, is_reader, context, notify_address, busy_loop_s=0)

    shm_broadcast.SpinCondition.__init__ = init
    shm_broadcast.SPINLOOP_EXT_ENABLED = False
