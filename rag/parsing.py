"""Files to text, always in another process with limits, so that no file can stop, block or eat the process that asks.

`parse_file` reads one file and is done; `DocumentParser` keeps the parser process warm for many. Both block: async
code calls them in a thread. A parser serves one file at a time; several run side by side for parallel work.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import ParseError
from rag.filenames import clean_filename
from rag.parser_folder import parser_folder
from rag.types import PageSpan, ParsedDocument

_LENGTH = struct.Struct(">Q")
_SOURCE_ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT_S = 120.0
_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """What one file may take. `cpu_s`: processor time; none means as much as the clock allows. `ocr_languages`: of
    scanned PDFs, in tesseract's names; none: no text recognition. `ocr_program`: a name or a path."""

    max_file_bytes: int = 64 << 20
    timeout_s: float = 60.0
    memory_bytes: int = 1536 << 20
    cpu_s: float | None = None
    max_text_bytes: int = 256 << 20
    ocr_languages: str | None = None
    ocr_program: str = "tesseract"


def parse_file(path: Path, filename: str, limits: ParseLimits | None = None) -> ParsedDocument:
    """Text of the file at `path`, which its owner calls `filename` (a label, never used as a path).

    Raises `ParseError` with code `bad_filename`, `empty_file`, `encrypted`, `damaged`, `unknown_type`,
    `type_mismatch`, `too_large`, `timeout`, `out_of_memory`, `ocr_missing`, `ocr_failed` or `parser_failed`.
    """
    with DocumentParser(limits or ParseLimits()) as parser:
        return parser.parse_file(path, filename)


class DocumentParser:
    """A warm parser process. Safe to use from several threads, which then take turns."""

    def __init__(self, limits: ParseLimits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()

    def __enter__(self) -> DocumentParser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def parse_file(self, path: Path, filename: str) -> ParsedDocument:
        return _parsed(self.ask(path, filename, {}))

    def ask(self, path: Path, filename: str, task: dict[str, Any]) -> dict[str, Any]:
        """The process's answer about one file: its text, or what `task` asks for. Raises `ParseError`."""
        name = clean_filename(filename)
        self._check_size(path, name)
        with self._turn:
            return _read_answer(self._ask(self._request(path, name, task), name))

    def close(self) -> None:
        """End the parser process, also in the middle of a file that another thread waits for."""
        process = self._process
        if process is not None:
            process.kill()
        with self._turn:
            self._discard()

    def _discard(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _check_size(self, path: Path, name: str) -> None:
        num_bytes = path.stat().st_size
        if num_bytes > self._limits.max_file_bytes:
            raise ParseError(
                f"{name} has {num_bytes / (1 << 20):.1f} MiB; at most {self._limits.max_file_bytes / (1 << 20):g} MiB "
                "can be read. Split it or raise ingestion.max_file_mib.",
                code="too_large",
            )

    def _request(self, path: Path, name: str, task: dict[str, Any]) -> bytes:
        limits = self._limits
        request = task | {
            "path": str(path.absolute()),
            "name": name,
            "timeout_s": limits.timeout_s,
            "cpu_s": limits.cpu_s or limits.timeout_s,
            "memory_bytes": limits.memory_bytes,
            "max_answer_bytes": limits.max_text_bytes,
            "ocr_languages": limits.ocr_languages,
            "ocr_program": shutil.which(limits.ocr_program) if limits.ocr_languages else None,
        }
        return json.dumps(request).encode()

    def _ask(self, request: bytes, name: str) -> bytes:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = _start_process()
        # The process keeps the limits itself; this one is for the case that it cannot.
        deadline = time.monotonic() + self._limits.timeout_s + _GRACE_S
        try:
            return _exchange(process, request, deadline)
        except (BrokenPipeError, EOFError, TimeoutError, ValueError) as error:
            self._discard()
            raise ParseError(
                f"{name} could not be read: the parser process ended or hung ({error}). Try again; if it happens "
                "again, the file cannot be read here.",
                code="parser_failed",
            ) from error


def _start_process() -> subprocess.Popen[bytes]:
    """Raises `RuntimeError` where the parser cannot run here at all, which no file is to blame for."""
    environment = {"PYTHONPATH": str(_SOURCE_ROOT), "PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/nonexistent"}
    environment["TMPDIR"] = str(parser_folder())
    process = subprocess.Popen(
        [sys.executable, "-m", "rag.parser_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    try:
        _receive(process, time.monotonic() + _START_TIMEOUT_S)
    except (EOFError, TimeoutError) as error:
        _end(process)
        raise RuntimeError(f"The parser process does not start ({error}); its own output says why.") from error
    return process


def _exchange(process: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    assert process.stdin is not None
    process.stdin.write(_LENGTH.pack(len(request)) + request)
    return _receive(process, deadline)


def _receive(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    assert process.stdout is not None
    source = process.stdout.fileno()
    (length,) = _LENGTH.unpack(_read_exactly(source, _LENGTH.size, deadline))
    return _read_exactly(source, length, deadline)


def _read_exactly(source: int, num_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        ready, _, _ = select.select([source], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError("no answer in time")
        piece = os.read(source, min(num_bytes - len(data), 1 << 20))
        if not piece:
            raise EOFError("it closed its output")
        data += piece
    return bytes(data)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process; its child, in a group of its own, asked the kernel to follow it."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _read_answer(answer: bytes) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(answer)
    if "code" in content:
        raise ParseError(content["message"], code=content["code"])
    return content


def _parsed(content: dict[str, Any]) -> ParsedDocument:
    document = content["document"]
    return ParsedDocument(
        text=document["text"],
        mime_type=document["mime_type"],
        title=document["title"],
        pages=tuple(PageSpan(**page) for page in document["pages"]),
        language=document["language"],
        warnings=tuple(document["warnings"]),
    )
