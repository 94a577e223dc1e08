"""Loaded by vLLM in each of its processes (entry point group `vllm.general_plugins`): turns windfarm's parts on.

Each part is a module of its own and is on only where it belongs. The end with the parent process: wherever an engine
of ours started vLLM. Grammars of continued answers: in the process that schedules, on a version of vLLM whose private
parts they know. All others: only on such a version, and only where vLLM's platform is the CPU. Of these, patient queues
are on in all of an engine's processes; CPU linear layers, CPU collectives, CPU experts, experts in bfloat16, placed
experts, expert counters and governed spinning only in the workers, which compute.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing

from cluster.vllm_plugin import end_with_parent
from cluster.vllm_plugin.versions import is_known_version

logger = logging.getLogger("vllm.windfarm")

# vLLM gives its processes names that begin so.
_WORKER_NAME = "VllmWorker"
_SCHEDULER_NAME = "EngineCore"

parts: tuple[str, ...] = ()
"""Names of the parts that are on in this process."""
is_loaded = False
"""Whether vLLM has loaded this plugin here, as it then does in the processes that it starts."""


def register() -> None:
    """Called by vLLM once per process."""
    global parts, is_loaded
    is_loaded = True
    if end_with_parent.install():
        parts = (*parts, "end_with_parent")
    # The process that made the engine computes nothing, and importing what the other parts change takes a while.
    if multiprocessing.parent_process() is None:
        return
    names = []
    if multiprocessing.current_process().name.startswith(_SCHEDULER_NAME) and is_known_version():
        names += ["continued_grammars"]
    names += _cpu_parts()
    for name in names:
        importlib.import_module(f"{__name__}.{name}").install()
    parts = (*parts, *names)


def _cpu_parts() -> list[str]:
    if not _is_for_us():
        return []
    names = ["patient_queues"]
    process = multiprocessing.current_process().name
    if process.startswith(_SCHEDULER_NAME):
        names += ["forked_workers"]
    if process.startswith(_WORKER_NAME):
        names += ["cpu_linear", "cpu_collectives", "cpu_experts", "bf16_experts", "placed_experts", "expert_counters"]
        names += ["governed_spinning"]
    return names


def _is_for_us() -> bool:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    if not is_known_version():
        logger.warning("windfarm's CPU parts are off: this version of vLLM is unknown to them.")
        return False
    return True
