"""vLLM's processes sleep while they wait for each other, instead of spinning on a core that computes.

Each engine has a process that schedules and one or more that compute; they talk through shared memory and spin for a
second before they wait for a signal. With a core for everybody that saves some microseconds per step. Where there are
as many cores as computing processes the scheduler's spinning takes a third of them away.

The signal alone is not enough: its socket holds one message and drops the next one until it has heard that the first
was taken. A reader whose signal was dropped would look again by itself only after five seconds; vLLM seldom meets that,
since it spins when messages come fast. So a reader looks again after a tenth of the time that it has waited already.
"""

from __future__ import annotations

import time
from typing import Any

_LEAST_MS = 1
_MOST_MS = 100


def install() -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    condition = shm_broadcast.SpinCondition
    original_init, original_wait = condition.__init__, condition.wait

    def init(self: Any, is_reader: bool, context: Any, notify_address: str, busy_loop_s: float = 1) -> None:
        del busy_loop_s
        original_init(self, is_reader, context, notify_address, busy_loop_s=0)

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        look_ms = look_again_ms(time.monotonic() - self.last_read)
        original_wait(self, look_ms if timeout_ms is None else min(look_ms, timeout_ms))

    condition.__init__ = init
    condition.wait = wait
    shm_broadcast.SPINLOOP_EXT_ENABLED = False


def look_again_ms(quiet_s: float) -> int:
    """For how long to sleep at most, when the last message was read so many seconds ago."""
    return min(max(_LEAST_MS, int(quiet_s * 100)), _MOST_MS)
