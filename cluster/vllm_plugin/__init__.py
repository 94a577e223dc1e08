"""Loaded by vLLM in each of its processes (entry point group `vllm.general_plugins`): turns windfarm's parts on.

Each part is a module of its own and is on only where it belongs: the end with the parent process wherever an engine of
ours started vLLM; CPU collectives, CPU experts, expert placement and expert counters only in worker processes, only
where vLLM's platform is the CPU, and only on a vLLM version whose private parts they know.
"""

from __future__ import annotations

import logging
import multiprocessing

from cluster.vllm_plugin import end_with_parent
from cluster.vllm_plugin.versions import is_known_version

logger = logging.getLogger("vllm.windfarm")

# vLLM gives its worker processes names that begin so. Nothing else computes, and importing the experts takes a while.
_WORKER_NAME = "VllmWorker"

parts: tuple[str, ...] = ()
"""Names of the parts that are on in this process."""


def register() -> None:
    """Called by vLLM once per process."""
    global parts
    if end_with_parent.install():
        parts = (*parts, "end_with_parent")
    if not multiprocessing.current_process().name.startswith(_WORKER_NAME):
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if not is_known_version():
        logger.warning("windfarm's CPU parts are off: this version of vLLM is unknown to them.")
        return
    from cluster.vllm_plugin import cpu_collectives, cpu_experts, expert_counters, placed_experts

    cpu_collectives.install()
    cpu_experts.install()
    placed_experts.install()
    expert_counters.install()
    parts = (*parts, "cpu_collectives", "cpu_experts", "placed_experts", "expert_counters")
