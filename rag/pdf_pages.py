"""Draws one page of a PDF with a span of its text marked, without limits: only the parser process calls this.

PDFium (BSD, through pypdfium2) draws and tells where each character stands; Pillow puts the colour over it.
"""

from __future__ import annotations

import base64
import ctypes
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pypdfium2
import pypdfium2.raw as pdfium
from PIL import Image, ImageChops, ImageDraw

from rag.errors import ParseError
from rag.span_matching import find_on_page

_MAX_PIXELS = 6_000_000
_MAX_CHARACTERS = 300_000
_COLOUR, _BORDER = (255, 236, 100), (214, 140, 0)

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image, from its top left corner."""


def draw_page(path: str, name: str, page: int, page_text: str, start: int, end: int, width: int) -> dict[str, Any]:
    """PNG of page `page` (from 1) about `width` pixels wide, with `page_text[start:end]` marked, as JSON values:
    `png` (base64), `width`, `height`, and `boxes`, the marked rectangles (`Box`; empty where the page does not show
    the span as text). Raises `ParseError`."""
    try:
        with pypdfium2.PdfDocument(path) as document:
            if not 1 <= page <= len(document):
                raise ParseError(f"{name} has {len(document)} pages, so there is no page {page}.", code="no_such_page")
            image, boxes = _draw(document[page - 1], page_text, start, end, width)
    except pypdfium2.PdfiumError as error:
        raise ParseError(f"Page {page} of {name} cannot be drawn ({error}).", code="damaged") from error
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return {
        "png": base64.b64encode(buffer.getvalue()).decode(),
        "width": image.width,
        "height": image.height,
        "boxes": [[round(value, 1) for value in box] for box in boxes],
    }


def _draw(page: pypdfium2.PdfPage, page_text: str, start: int, end: int, width: int) -> tuple[Image.Image, list[Box]]:
    points_wide, points_high = page.get_size()
    if not (points_wide > 0 and points_high > 0):
        raise pypdfium2.PdfiumError("the page has no size")
    scale = width / points_wide
    scale = min(scale, (_MAX_PIXELS / (points_wide * points_high)) ** 0.5)
    image = page.render(scale=scale).to_pil().convert("RGB")
    text = page.get_textpage()
    # PDFium's own indices: its text functions leave some of them out, so characters are read one by one.
    num_characters = min(text.count_chars(), _MAX_CHARACTERS)
    drawn = [_character(text, index) for index in range(num_characters)]
    ranges = find_on_page(page_text, start, end, drawn)
    is_turned = page.get_rotation() in (90, 270)
    boxes = [box for first, last in ranges for box in _lines(_boxes(page, text, first, last, image.size), is_turned)]
    return _marked(image, boxes), boxes


def _character(text: pypdfium2.PdfTextPage, index: int) -> str:
    code = pdfium.FPDFText_GetUnicode(text, index)
    # U+FFFE and U+0002 are PDFium's marks for a hyphen at a line end; lone surrogates cannot be compared.
    return "-" if code in (0xFFFE, 0x2) else " " if code == 0 or 0xD800 <= code <= 0xDFFF else chr(code)


def _boxes(
    page: pypdfium2.PdfPage, text: pypdfium2.PdfTextPage, first: int, last: int, size: tuple[int, int]
) -> Iterator[Box]:
    for index in range(first, last):
        left, bottom, right, top = text.get_charbox(index, loose=True)
        if right > left and top > bottom:
            (x1, y1), (x2, y2) = _to_image(page, size, left, bottom), _to_image(page, size, right, top)
            yield min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _to_image(page: pypdfium2.PdfPage, size: tuple[int, int], x: float, y: float) -> tuple[int, int]:
    """From the page's own coordinates, which know nothing of its rotation and crop box, to pixels."""
    across, down = ctypes.c_int(), ctypes.c_int()
    pdfium.FPDF_PageToDevice(page, 0, 0, *size, 0, x, y, ctypes.byref(across), ctypes.byref(down))
    return across.value, down.value


def _lines(boxes: Iterator[Box], is_turned: bool) -> list[Box]:
    """Boxes of neighbouring characters as one box per line, which runs down where the page is turned."""
    lines: list[Box] = []
    for box in boxes:
        if lines and _continues(lines[-1], box, is_turned):
            last = lines[-1]
            box = (min(last[0], box[0]), min(last[1], box[1]), max(last[2], box[2]), max(last[3], box[3]))
            lines[-1] = box
        else:
            lines.append(box)
    return lines


def _continues(line: Box, box: Box, is_turned: bool) -> bool:
    """Whether a character stands in the same line, at most three times its height away."""
    along, across = (1, 0) if is_turned else (0, 1)
    size = box[across + 2] - box[across]
    overlap = min(line[across + 2], box[across + 2]) - max(line[across], box[across])
    gap = max(line[along], box[along]) - min(line[along + 2], box[along + 2])
    return overlap > 0.5 * size and gap < 3 * size


def _marked(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The colour is multiplied, so that black text stays black; the border shows it on dark pages too."""
    if not boxes:
        return image
    colour = Image.new("RGB", image.size, (255, 255, 255))
    paint = ImageDraw.Draw(colour)
    for left, top, right, bottom in boxes:
        paint.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=_COLOUR)
    marked = ImageChops.multiply(image, colour)
    border = ImageDraw.Draw(marked)
    for left, _, right, bottom in boxes:
        border.line((left - 2, bottom + 2, right + 2, bottom + 2), fill=_BORDER, width=2)
    return marked
