"""Routes that move whole knowledge bases: export and import of collections, backup and restore of everything."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from services.calls import Calls
from services.errors import invalid
from services.event_stream import ClientGone
from services.routing import Answer, Call, Route, json_answer

_WAIT_S = 60.0
_BLOCK = 1 << 20


class TransferRoutes:
    """`folder` lies on the store's own disk; files are in it only while a request is under way."""

    def __init__(self, store: Calls, folder: Path) -> None:
        self._store = store
        self._folder = folder

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v1/kb/export", self.export),
            Route("POST", "/v1/kb/import", self.import_),
            Route("GET", "/v1/backup", self.backup),
            Route("POST", "/v1/restore", self.restore),
        ]

    async def export(self, call: Call) -> None:
        """`?collections=a,b`: the file. Without it all that the caller manages."""
        names = [name for name in call.query.get("collections", "").split(",") if name]
        await self._download(call, "windfarm.kb", "begin_export", names)

    async def backup(self, call: Call) -> None:
        await self._download(call, "windfarm.backup", "begin_backup")

    async def import_(self, call: Call) -> Answer:
        return await self._upload(call, "begin_import")

    async def restore(self, call: Call) -> Answer:
        return await self._upload(call, "begin_restore")

    async def _download(self, call: Call, name: str, method: str, *arguments: Any) -> None:
        async with self._temporary() as path:
            await self._until_done(call, await self._store.call(method, *arguments, call.actor.user_id, path))
            num_bytes = path.stat().st_size
            headers = {
                "content-type": "application/octet-stream",
                "content-length": str(num_bytes),
                "content-disposition": f'attachment; filename="{name}"',
                "cache-control": "no-store",
                "x-request-id": call.request_id,
            }
            raw = [(key.encode(), value.encode()) for key, value in headers.items()]
            await call.send({"type": "http.response.start", "status": 200, "headers": raw})
            with path.open("rb") as file:
                while block := await asyncio.to_thread(file.read, _BLOCK):
                    await call.send({"type": "http.response.body", "body": block, "more_body": True})
            await call.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _upload(self, call: Call, method: str) -> Answer:
        """The body is the file itself. It is as long as it is: only people who may import get here, and it goes to the
        disk as it comes."""
        if not call.headers.get("content-type", "").lower().startswith("application/octet-stream"):
            raise invalid("Send the file itself as the body, with `Content-Type: application/octet-stream`.")
        await self._store.call("require_importer", call.actor.user_id)
        async with self._temporary() as path:
            with path.open("wb") as file:
                more = True
                while more:
                    message = await call.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    await asyncio.to_thread(file.write, message.get("body", b""))
                    more = message.get("more_body", False)
            transfer_id = await self._store.call(method, call.actor.user_id, path)
            return json_answer(await self._until_done(call, transfer_id))

    async def _until_done(self, call: Call, transfer_id: str) -> dict[str, Any]:
        """One call waits for less than calls may take; long transfers need several."""
        while True:
            done = await self._store.call("wait_for_transfer", transfer_id, call.actor.user_id, _WAIT_S)
            if done is not None:
                result: dict[str, Any] = done
                return result

    @contextlib.asynccontextmanager
    async def _temporary(self) -> AsyncIterator[Path]:
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        path = self._folder / f"transfer-{secrets.token_hex(12)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
