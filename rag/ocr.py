"""Text of scanned pages, by the system's tesseract (Apache-2.0), without limits: only the parser process calls this.

Pages are drawn by PDFium and go to tesseract through a pipe; nothing is written to disk. Off unless configured, because
recognised text holds mistakes.
"""

from __future__ import annotations

import os
import subprocess

import pypdfium2

from rag.errors import ParseError

INSTALL = "sudo apt-get install tesseract-ocr, and tesseract-ocr-deu and the like for languages other than English"
_DOTS_PER_INCH = 300
_POINTS_PER_INCH = 72
_MAX_PIXELS = 20_000_000


def recognise_pages(data: bytes, name: str, program: str | None, languages: str) -> list[str]:
    """The text of each page of a PDF. `program`: path of tesseract; none where there is none. `languages`: tesseract's
    names, such as `eng+deu`. Raises `ParseError` with code `ocr_missing`, `ocr_failed` or `damaged`."""
    if program is None:
        raise ParseError(
            f"{name} has no text layer, and the text recognition that ingestion.ocr_languages asks for is not "
            f"installed. Install it ({INSTALL}), or run text recognition over the file before.",
            code="ocr_missing",
        )
    try:
        with pypdfium2.PdfDocument(data) as document:
            return [_recognise(_picture(document[number]), name, program, languages) for number in range(len(document))]
    except pypdfium2.PdfiumError as error:
        raise ParseError(f"The pages of {name} cannot be drawn ({error}).", code="damaged") from error


def _picture(page: pypdfium2.PdfPage) -> bytes:
    """A page in shades of grey, as PGM (Netpbm)."""
    wide, high = page.get_size()
    if not (wide > 0 and high > 0):
        raise pypdfium2.PdfiumError("a page has no size")
    scale = min(_DOTS_PER_INCH / _POINTS_PER_INCH, (_MAX_PIXELS / (wide * high)) ** 0.5)
    image = page.render(scale=scale, grayscale=True).to_pil().convert("L")
    return b"P5 %d %d 255\n" % image.size + image.tobytes()


def _recognise(picture: bytes, name: str, program: str, languages: str) -> str:
    command = [program, "stdin", "stdout", "-l", languages, "--dpi", str(_DOTS_PER_INCH)]
    try:
        # One thread: the parser has one core, and its processor time is counted.
        answer = subprocess.run(
            command, input=picture, capture_output=True, check=False, env={**os.environ, "OMP_THREAD_LIMIT": "1"}
        )
    except OSError as error:
        raise ParseError(
            f"{name}: {program} cannot be run ({error.strerror}). {INSTALL}.", code="ocr_failed"
        ) from error
    if answer.returncode != 0:
        said = " ".join(answer.stderr.decode("utf-8", "replace").split())[:200]
        raise ParseError(
            f"Text recognition of {name} failed: {said}. Check ingestion.ocr_languages ({languages}); {INSTALL}.",
            code="ocr_failed",
        )
    return answer.stdout.decode("utf-8", "replace").replace("\f", "").strip()
