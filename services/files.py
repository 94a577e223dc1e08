"""Files that clients upload to their own account, as OpenAI's files API has them: rows in the database, bytes in a
folder. Nobody sees another person's. A file becomes searchable when it is added to a vector store. Calls block.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from sqlalchemy import select

from rag.errors import ParseError
from rag.filenames import clean_filename
from services.accounts import Actor
from services.database import Database, StoredFile, new_id
from services.errors import ApiError, invalid, not_found

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
Json = dict[str, Any]
_YOUNG_S = 3600.0


class Files:
    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder

    def add(self, actor: Actor, source: Path, filename: str, purpose: str) -> Json:
        """Take over the uploaded file at `source`, which lies on the same disk and may go afterwards."""
        if purpose not in PURPOSES:
            raise invalid(
                f"'purpose' is '{purpose[:40]}', but one of {', '.join(PURPOSES)} is expected.", param="purpose"
            )
        try:
            name = clean_filename(filename)
        except ParseError as error:
            raise invalid(str(error), param="file", code=error.code) from error
        file_id = new_id("file").replace("_", "-")
        self._folder.mkdir(parents=True, exist_ok=True)
        os.link(source, self.path(file_id))
        try:
            with self._database.write() as session:
                row = StoredFile(
                    id=file_id,
                    owner_id=actor.user_id,
                    filename=name,
                    purpose=purpose,
                    num_bytes=source.stat().st_size,
                )
                session.add(row)
                session.flush()
                return file_json(row)
        except BaseException:
            self.path(file_id).unlink(missing_ok=True)
            raise

    def entries(self, actor: Actor, purpose: str | None = None) -> list[Json]:
        """One's own, the newest last."""
        wanted = select(StoredFile).where(StoredFile.owner_id == actor.user_id)
        if purpose is not None:
            wanted = wanted.where(StoredFile.purpose == purpose)
        with self._database.read() as session:
            rows = session.scalars(wanted.order_by(StoredFile.created_at, StoredFile.id)).all()
        return [file_json(row) for row in rows]

    def own(self, actor: Actor, file_id: str) -> StoredFile:
        with self._database.read() as session:
            row = session.get(StoredFile, file_id)
        if row is None or row.owner_id != actor.user_id:
            raise unknown_file(file_id)
        return row

    def path(self, file_id: str) -> Path:
        return self._folder / file_id

    def delete(self, actor: Actor, file_id: str) -> None:
        """The row first: a file without a row is seen by nobody, and gone with the next start of the endpoint."""
        self.own(actor, file_id)
        with self._database.write() as session:
            session.delete(session.get_one(StoredFile, file_id))
        self.path(file_id).unlink(missing_ok=True)

    def remove_strays(self) -> int:
        """Delete files that a kill left without a row; not young ones, whose row may be on its way in another process.
        Returns how many there were."""
        if not self._folder.is_dir():
            return 0
        oldest = time.time() - _YOUNG_S
        found = {file.name: file for file in self._folder.iterdir() if file.stat().st_ctime < oldest}
        with self._database.read() as session:
            known = set(session.scalars(select(StoredFile.id)))
        strays = [file for name, file in found.items() if name not in known]
        for file in strays:
            file.unlink(missing_ok=True)
        return len(strays)


def file_json(row: StoredFile) -> Json:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.num_bytes,
        "created_at": int(row.created_at.timestamp()),
        "expires_at": None,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }


def unknown_file(file_id: str) -> ApiError:
    return not_found(f"There is no file {file_id[:80]!r} of yours.", code="file_not_found", param="file_id")
