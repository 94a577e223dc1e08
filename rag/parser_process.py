"""The parser's own process: reads requests from its input, forks one short-lived child per file, watches and ends it.

Started by `rag.parsing` with nothing of the environment but what Python needs. It loads the parser once and forks
before the parser has started a thread, so that each file begins in a fresh, warm process and leaves nothing behind:
no memory, no thread, no handle. Limits on processor time, memory and clock time hold per file. When the owner dies,
this process reads the end of its input, ends the child and leaves.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import struct
import time
from dataclasses import asdict
from typing import Any, NoReturn

from rag.errors import ParseError
from rag.extraction import extract, with_recognised_text
from rag.filetypes import PDF
from rag.parser_folder import unpack_library
from rag.types import ParsedDocument

_LENGTH = struct.Struct(">Q")
READY = b"ready"
_POLL_S = 0.05
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_PAGE_BYTES = resource.getpagesize()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = os.dup(0), os.dup(1)
    # Whatever the parser prints must not get between the answers.
    os.dup2(2, 1)
    os.close(0)
    unpack_library()
    _send(answers, READY)
    while (request := _receive(requests)) is not None:
        _send(answers, _serve(json.loads(request), requests))


def _serve(request: dict[str, Any], lifeline: int) -> bytes:
    """Parse one file, or draw a page of it, in a child. Returns the answer's JSON."""
    if "page" in request:
        # Loaded before the fork, once: it starts no thread, and each page would pay for it again.
        import rag.pdf_pages  # noqa: F401
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _parse_and_leave(request, writer)
    os.close(writer)
    try:
        return _Watch(child, reader, lifeline, request).until_answer()
    finally:
        os.close(reader)


class _Watch:
    """Follows one child until it answered, broke a limit or died, and makes sure that it is gone."""

    def __init__(self, child: int, reader: int, lifeline: int, request: dict[str, Any]) -> None:
        self._child = child
        self._reader = reader
        self._lifeline = lifeline
        self._request = request
        self._deadline = time.monotonic() + request["timeout_s"]
        self._answer = bytearray()
        self._peak_bytes = 0

    def until_answer(self) -> bytes:
        broken: str | None = None
        try:
            while broken is None and not self._has_read_all():
                broken = self._broken_limit()
        finally:
            status = self._end_child()
        if broken is None and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return bytes(self._answer)
        return _error_json(broken or self._why_died(status), self._request)

    def _has_read_all(self) -> bool:
        wait_s = min(_POLL_S, max(0.0, self._deadline - time.monotonic()))
        ready, _, _ = select.select([self._reader, self._lifeline], [], [], wait_s)
        if self._lifeline in ready:
            # One request at a time: anything readable here is the end of the input, so the owner is gone.
            self._end_child()
            os._exit(0)
        if self._reader not in ready:
            return False
        piece = os.read(self._reader, 1 << 20)
        self._answer += piece
        return not piece

    def _broken_limit(self) -> str | None:
        if time.monotonic() >= self._deadline:
            return "timeout"
        self._peak_bytes = max(self._peak_bytes, _resident_bytes(self._child))
        if self._peak_bytes > self._request["memory_bytes"]:
            return "out_of_memory"
        return "too_large" if len(self._answer) > self._request["max_answer_bytes"] else None

    def _end_child(self) -> int:
        try:
            os.killpg(self._child, signal.SIGKILL)
        except ProcessLookupError:
            # It is gone or has not yet made its own group.
            os.kill(self._child, signal.SIGKILL)
        return os.waitpid(self._child, 0)[1]

    def _why_died(self, status: int) -> str:
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        if ended_by == signal.SIGXCPU:
            return "too_much_work"
        # The native parser aborts when it gets no memory; the kernel kills where the machine has none left.
        is_memory = ended_by == signal.SIGKILL or (
            ended_by == signal.SIGABRT and self._peak_bytes > self._request["memory_bytes"] // 2
        )
        return "out_of_memory" if is_memory or _exit_code(status) == _EXIT_NO_MEMORY else "crashed"


_EXIT_NO_MEMORY = 3


def _exit_code(status: int) -> int | None:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def _parse_and_leave(request: dict[str, Any], writer: int) -> NoReturn:
    """What the child does. It never returns into its parent's loop."""
    code = 1
    try:
        os.setpgid(0, 0)
        _limit_child(request)
        _write_all(writer, _answer(request))
        code = 0
    except MemoryError:
        code = _EXIT_NO_MEMORY
    finally:
        os._exit(code)


def _answer(request: dict[str, Any]) -> bytes:
    try:
        if "page" in request:
            return json.dumps({"image": _draw(request)}).encode()
        with open(request["path"], "rb") as file:
            data = file.read()
        document = extract(data, request["name"])
        if not document.text and document.mime_type == PDF.mime_type and request["ocr_languages"]:
            document = _recognised(document, data, request)
    except ParseError as error:
        return json.dumps({"code": error.code, "message": str(error)}).encode()
    return _document_json(document)


def _recognised(document: ParsedDocument, data: bytes, request: dict[str, Any]) -> ParsedDocument:
    from rag.ocr import recognise_pages

    pages = recognise_pages(data, request["name"], request["ocr_program"], request["ocr_languages"])
    return with_recognised_text(document, pages, request["name"])


def _draw(request: dict[str, Any]) -> dict[str, Any]:
    from rag.pdf_pages import draw_page

    span = request["page_text"], request["start"], request["end"]
    return draw_page(request["path"], request["name"], request["page"], *span, request["width"])


def _document_json(document: ParsedDocument) -> bytes:
    return json.dumps({"document": asdict(document)}, ensure_ascii=False).encode("utf-8", "replace")


def _limit_child(request: dict[str, Any]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NAME, b"windfarm-parse", 0, 0, 0)
    cpu_s = int(request["cpu_s"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    address_bytes = _address_space_bytes() + request["memory_bytes"] + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (address_bytes, address_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Where the machine itself runs out of memory, this process goes first.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _address_space_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * _PAGE_BYTES


def _resident_bytes(process_id: int) -> int:
    try:
        with open(f"/proc/{process_id}/statm") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _error_json(code: str, request: dict[str, Any]) -> bytes:
    name, memory_mib, text_mib = request["name"], request["memory_bytes"] >> 20, request["max_answer_bytes"] >> 20
    message = {
        "timeout": f"{name} could not be read within {request['timeout_s']:g} s. "
        "Split it or raise ingestion.parse_timeout_s.",
        "too_much_work": f"Reading {name} takes more than {request['cpu_s']:g} s of processor time. "
        "Split it or raise ingestion.parse_cpu_s.",
        "out_of_memory": f"Reading {name} takes more than {memory_mib} MiB of memory. "
        "Split it or raise ingestion.parse_memory_mib.",
        "too_large": f"{name} holds more text than {text_mib} MiB. Split it into smaller files.",
        "crashed": f"{name} is damaged: the parser broke off. Open it in its own program, save it again and upload it.",
    }[code]
    public = {"crashed": "damaged", "too_much_work": "timeout"}.get(code, code)
    return json.dumps({"code": public, "message": message}).encode()


def _receive(source: int) -> bytes | None:
    header = _read_exactly(source, _LENGTH.size)
    return None if header is None else _read_exactly(source, _LENGTH.unpack(header)[0])


def _read_exactly(source: int, num_bytes: int) -> bytes | None:
    data = bytearray()
    while len(data) < num_bytes:
        piece = os.read(source, num_bytes - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _send(target: int, payload: bytes) -> None:
    _write_all(target, _LENGTH.pack(len(payload)) + payload)


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


if __name__ == "__main__":
    main()
