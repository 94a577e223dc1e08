"""A disk that is full or read-only, under uploads, searches and chats of a process that has it for itself."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.chaos.contract import ROOT
from tests.chaos.faults import Fault, Outcome


def faults(_quick: bool) -> list[Fault]:
    return [Fault("disk full or read-only", 5, fill_the_disk, needs="tmpfs")]


async def fill_the_disk(folder: Path) -> Outcome:
    """The longest time until somebody heard that there is no room, or was served when there was room again."""
    program = [sys.executable, "-m", "tests.services.ingest_on_small_disk", str(folder)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("unshare", "--mount", *program, cwd=ROOT, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate()
    if process.returncode:
        return Outcome(float("nan"), "-", errors.decode(errors="replace")[-300:])
    seconds = json.loads(output.splitlines()[-1])["seconds"]
    return Outcome(max(seconds), "uploads and chats are refused, searches go on; then all works again")
