"""vLLM's processes end with the process that started the engine.

Its engine and worker processes outlive a parent that is killed, and then hold memory and cores for ever. Linux can
signal a process when the thread that started it ends, so the starter must be a thread that lives as long as the engine.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

PARENT_VARIABLE = "WINDFARM_ENGINE_PARENT"
_PR_SET_PDEATHSIG = 1


def install() -> bool:
    """Does nothing, and says so, outside processes that descend from an engine of ours."""
    starter = os.environ.get(PARENT_VARIABLE)
    if starter is None:
        return False
    if int(starter) == os.getpid():
        _bind_coordinator()
        return False
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not _exists(int(starter)):  # it ended before the signal was armed
        os._exit(1)
    return True


def _bind_coordinator() -> None:
    """In the starter: the process that coordinates a gang loads no plugins, so it begins with a function of ours."""
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    process: Any = DPCoordinatorProc
    process.run_coordinator = staticmethod(run_bound_coordinator)


def run_bound_coordinator(*args: Any, **options: Any) -> None:
    """vLLM's coordinator, in a new process that ends with its parent."""
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    install()
    DPCoordinatorProc.run_coordinator(*args, **options)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
