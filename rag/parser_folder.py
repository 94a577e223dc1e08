"""The folder into which kreuzberg unpacks the library that it reads PDFs with.

It takes a fixed name below the folder for temporary files, which on most machines everybody may write to: whoever makes
it first decides what the parser runs. So the parser gets a folder of its own there, which nobody else may write to, and
the library is unpacked before the first file comes, because the processes that read files may write none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import tempfile
from importlib.metadata import version
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LIBRARY = Path("kreuzberg-pdfium", "libpdfium.so")
_EMPTY_PAGE = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
)


def parser_folder() -> Path:
    """Ours alone, kept for the next start; made where it is not there. Raises `RuntimeError` where it cannot be had."""
    folder = Path(tempfile.gettempdir()) / f"windfarm-parser-{os.getuid()}-{version('kreuzberg')}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise RuntimeError(
            f"The parser needs a folder for its library: {error}. Set TMPDIR to another place."
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RuntimeError(
            f"{folder} is somebody else's or others may write to it, so the parser does not use it. "
            "Remove it, or set TMPDIR to another place."
        )
    return folder


def unpack_library() -> None:
    """In the parser's process, whose folder for temporary files is `parser_folder()`: in a child, since the parser
    starts threads, and those that read files are to be forked without any. Where it fails, each PDF says why."""
    if Path(tempfile.gettempdir(), _LIBRARY).exists():
        return
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            from kreuzberg import extract_bytes_sync

            extract_bytes_sync(_EMPTY_PAGE, "application/pdf")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
