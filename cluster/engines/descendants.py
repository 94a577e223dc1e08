"""Processes that an engine has started, to see which they are and to end what is left of them."""

from __future__ import annotations

import psutil


def descendants() -> list[psutil.Process]:
    """All but Python's own helper, which serves the whole process."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if not _is_resource_tracker(child)]


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def end_processes(processes: list[psutil.Process], limit_s: float) -> None:
    """vLLM's own shutdown leaves processes behind now and then."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=limit_s)
