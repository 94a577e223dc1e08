"""Workers on CPUs are forks of the engine's process instead of new Pythons.

vLLM starts a new Python for each worker on CPUs, which imports PyTorch and vLLM again: 13 seconds of a processor a
rank. The engine's process has imported them, has computed nothing when it starts its workers, and so has no threads of
OpenMP that a fork would lack; on GPUs vLLM's own default is the fork as well.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Any


def install() -> None:
    """In the process that schedules, which starts the workers."""
    from vllm.v1.executor import multiproc_executor

    executor: Any = multiproc_executor
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    os.register_at_fork(after_in_child=_forget_loaded_plugins)


def _forget_loaded_plugins() -> None:
    """A worker turns on parts of its own, and vLLM loads plugins only where it believes that they are not."""
    from vllm import plugins

    plugins.plugins_loaded = False
