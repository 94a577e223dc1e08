"""OpenAI's files API: `/v1/files`. Uploads are everybody's own."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.errors import conflict, invalid
from services.files import PURPOSES, Files, file_json
from services.pages import page_of
from services.routing import Answer, Call, Route, json_answer
from services.uploads import receive_upload
from services.vector_stores import VectorStores

_MOST_LISTED = 10_000
_EXPIRY = ("expires_after[anchor]", "expires_after[seconds]")


class FileRoutes:
    """`uploads` is a folder on the disk of the files, where a file waits until it is whole."""

    def __init__(self, files: Files, vector_stores: VectorStores, uploads: Path, max_file_mib: float) -> None:
        self._files = files
        self._vector_stores = vector_stores
        self._uploads = uploads
        self._max_file_mib = max_file_mib

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v1/files", self.list_files),
            Route("POST", "/v1/files", self.upload),
            Route("GET", "/v1/files/{id}", self.get),
            Route("DELETE", "/v1/files/{id}", self.delete),
            Route("GET", "/v1/files/{id}/content", self.content),
        ]

    async def upload(self, call: Call) -> Answer:
        kind, texts = call.headers.get("content-type", ""), ("purpose", *_EXPIRY)
        async with receive_upload(call.receive, kind, self._uploads, self._max_file_mib, texts) as upload:
            for name in _EXPIRY:
                if name in upload.fields:
                    raise invalid(
                        "'expires_after' is not supported: files stay until they are deleted. Leave it out.",
                        param="expires_after",
                        code="unsupported_parameter",
                    )
            if "purpose" not in upload.fields:
                raise invalid(
                    f"'purpose' is missing; one of {', '.join(PURPOSES)} is expected.",
                    param="purpose",
                    code="missing_required_parameter",
                )
            made = await asyncio.to_thread(
                self._files.add, call.actor, upload.path, upload.filename, upload.fields["purpose"]
            )
        return json_answer(made)

    async def list_files(self, call: Call) -> Answer:
        entries = await asyncio.to_thread(self._files.entries, call.actor, call.query.get("purpose"))
        return json_answer(page_of(call, entries, default=_MOST_LISTED, most=_MOST_LISTED, known=("purpose",)))

    async def get(self, call: Call) -> Answer:
        return json_answer(file_json(await asyncio.to_thread(self._files.own, call.actor, call.parameters["id"])))

    async def content(self, call: Call) -> Answer:
        file = await asyncio.to_thread(self._files.own, call.actor, call.parameters["id"])
        data = await asyncio.to_thread(self._files.path(file.id).read_bytes)
        # Somebody else's HTML must not run as a page of this address.
        headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
        return Answer(data, content_type="application/octet-stream", headers=headers)

    async def delete(self, call: Call) -> Answer:
        """Also takes it out of all vector stores, as OpenAI does."""
        file_id = call.parameters["id"]
        for store_id in await self._vector_stores.stores_of(call.actor, file_id):
            if any(file["id"] == file_id for file in await self._vector_stores.files(call.actor, store_id)):
                await self._vector_stores.remove_file(call.actor, store_id, file_id)
        if left := await self._vector_stores.stores_of(call.actor, file_id):
            raise conflict(
                f"The file is part of the vector store {left[0]}, which you cannot change. Ask its owner to remove it.",
                code="file_in_use",
            )
        await asyncio.to_thread(self._files.delete, call.actor, file_id)
        return json_answer({"id": file_id, "object": "file", "deleted": True})
