"""Long work on the whole knowledge base that a caller starts and then waits for in several calls: exports, imports,
backups, restores. One at a time; what it ended with is kept for an hour."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from services.database import new_id
from services.errors import conflict, not_found

_KEPT_S = 3600.0


@dataclass(slots=True)
class _Transfer:
    actor: str
    task: asyncio.Task[dict[str, Any]]
    begun_at: float


class Transfers:
    def __init__(self) -> None:
        self._transfers: dict[str, _Transfer] = {}

    def begin(self, actor: str, work: Coroutine[Any, Any, dict[str, Any]]) -> str:
        """Start the work. Returns the id to wait for it with."""
        now = time.monotonic()
        if any(not each.task.done() for each in self._transfers.values()):
            work.close()
            raise conflict(
                "Another export, import, backup or restore is running. Try again when it has ended.",
                code="transfer_running",
            )
        self._transfers = {key: each for key, each in self._transfers.items() if now - each.begun_at < _KEPT_S}
        transfer_id = new_id("transfer")
        self._transfers[transfer_id] = _Transfer(actor, asyncio.create_task(work), now)
        return transfer_id

    async def wait(self, transfer_id: str, actor: str, timeout_s: float) -> dict[str, Any] | None:
        """What the work returned, None while it runs on; raises what it raised."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.actor != actor:
            raise not_found("This transfer is not known any more: windfarm was restarted.", code="unknown_transfer")
        done, _ = await asyncio.wait([transfer.task], timeout=timeout_s)
        return transfer.task.result() if done else None

    async def close(self) -> None:
        """Wait for what runs: a thread cannot be stopped, and its steps are short of leaving half a state anyway."""
        if running := [each.task for each in self._transfers.values() if not each.task.done()]:
            await asyncio.wait(running)
