"""Receives one uploaded file: multipart/form-data, written to a temporary file as it comes, never whole in memory.

The file lies in the data folder, so that the store can take it over by renaming it. What is not taken is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from services.errors import ApiError, invalid
from services.event_stream import ClientGone, Receive
from services.routing import body_too_long

_MIB = 1 << 20
_FIELD = "file"
_MAX_HEADER_BYTES = 16 * 1024
# Boundaries and headers around the file.
_FORM_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Upload:
    path: Path
    filename: str
    """As the client named it; not to be used as a path."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Texts that came with it."""


@contextlib.asynccontextmanager
async def receive_upload(
    receive: Receive, content_type: str, folder: Path, max_mib: float, texts: Collection[str] = ()
) -> AsyncIterator[Upload]:
    """The uploaded file while the block runs, with the form's fields named in `texts`. 400, 413 or 507 with the reason
    where there is none."""
    boundary = _boundary(content_type)
    with _explain_disk_errors(folder):
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        file = NamedTemporaryFile(dir=folder, prefix="upload-", delete=False)  # noqa: SIM115  # closed below
    path = Path(file.name)
    try:
        form = _Form(boundary, file, texts)
        with _explain_disk_errors(folder), file:
            await _fill(form, receive, max_mib)
        yield Upload(path, form.required_filename(), form.texts())
    finally:
        _discard(path)


def _discard(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _fill(form: _Form, receive: Receive, max_mib: float) -> None:
    limit = int(max_mib * _MIB) + _FORM_BYTES
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            await asyncio.to_thread(form.feed, chunk)
        elif size > 2 * limit:
            raise body_too_long(max_mib)
        if not message.get("more_body", False):
            break
    if size > limit:
        raise body_too_long(max_mib)
    form.finish()


class _Form:
    """Finds the part named `file` and writes its bytes; of the others the short `texts` are kept, the rest refused."""

    def __init__(self, boundary: bytes, file: IO[bytes], texts: Collection[str]) -> None:
        self._file = file
        self._texts: dict[str, bytearray] = {name: bytearray() for name in texts}
        self._seen: set[str] = set()
        self._text: bytearray | None = None
        self._filename: str | None = None
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._is_complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": lambda data, start, end: self._grow(self._header_name, data[start:end]),
                "on_header_value": lambda data, start, end: self._grow(self._header_value, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_part,
                "on_part_data": lambda data, start, end: self._write(data[start:end]),
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _broken_form(str(error)) from None

    def finish(self) -> None:
        if not self._is_complete:
            raise _broken_form("it ends too early")

    def required_filename(self) -> str:
        if self._filename is None:
            raise _no_file()
        return self._filename

    def texts(self) -> dict[str, str]:
        return {name: self._texts[name].decode("utf-8", "replace") for name in self._seen}

    def _write(self, data: bytes) -> None:
        if self._text is None:
            self._file.write(data)
        else:
            self._grow(self._text, data)

    def _grow(self, buffer: bytearray, data: bytes) -> None:
        buffer += data
        if len(buffer) > _MAX_HEADER_BYTES:
            raise _broken_form("a header is too long")

    def _end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _begin_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._headers.clear()
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        self._text = self._texts.get(name) if filename is None else None
        if self._text is not None:
            if name in self._seen:
                raise invalid(f"The form has two fields '{name}'. Send one.", param=name, code="invalid_form")
            self._seen.add(name)
            return
        if name != _FIELD or filename is None:
            raise invalid(
                f"The form has a part '{name}', but only one file named '{_FIELD}' is expected "
                "(curl: -F file=@report.pdf).",
                param=name or _FIELD,
                code="unknown_parameter",
            )
        if self._filename is not None:
            raise invalid("The form holds two files. Send them one by one.", param=_FIELD, code="too_many_files")
        self._filename = filename.decode("utf-8", "replace")

    def _end(self) -> None:
        self._is_complete = True


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise ApiError(
            415,
            "invalid_request_error",
            "unsupported_media_type",
            f"A file is expected as multipart/form-data with a part '{_FIELD}' (curl: -F file=@report.pdf).",
        )
    return options[b"boundary"]


def _no_file() -> ApiError:
    return invalid(
        f"The form holds no file. Send it as the part '{_FIELD}' (curl: -F file=@report.pdf).",
        param=_FIELD,
        code="missing_required_parameter",
    )


def _broken_form(reason: str) -> ApiError:
    return invalid(f"The body is not a readable multipart form: {reason}.", code="invalid_form")


@contextlib.contextmanager
def _explain_disk_errors(folder: Path) -> Any:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
        raise ApiError(
            507,
            "server_error",
            "storage_unavailable",
            f"The file cannot be kept: {reason} ({folder}). Free some space or make the folder writable; "
            "then send the file again.",
        ) from error
