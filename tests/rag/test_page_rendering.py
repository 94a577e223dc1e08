"""Pages of real PDFs with a span marked: the marks lie on the ink of the words, and bad files end alone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pypdfium2
import pytest
from PIL import Image

from rag.errors import ParseError
from rag.page_rendering import PageImage, PageRenderer
from rag.parsing import DocumentParser, ParseLimits
from rag.types import PageSpan, ParsedDocument

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
LIMITS = ParseLimits(timeout_s=30)


@pytest.fixture(scope="module")
def renderer() -> Iterator[PageRenderer]:
    renderer = PageRenderer(LIMITS)
    yield renderer
    renderer.close()


@pytest.fixture(scope="module")
def parser() -> Iterator[DocumentParser]:
    with DocumentParser(LIMITS) as parser:
        yield parser


def draw(renderer: PageRenderer, name: str, parsed: ParsedDocument, page: PageSpan, start: int, end: int) -> PageImage:
    text = parsed.text[page.start : page.end]
    return renderer.render(DOCUMENTS / name, name, page.number, page_text=text, start=start, end=end)


def words_in(image: PageImage, path: Path, page: int) -> str:
    """What PDFium reads inside the marked boxes: another way back from pixels to text."""
    with pypdfium2.PdfDocument(path) as document:
        sheet = document[page - 1]
        wide, high = sheet.get_size()
        text = sheet.get_textpage()
        scale = wide / image.width
        return " ".join(
            text.get_text_bounded(
                left * scale - 1, high - bottom * scale - 1, right * scale + 1, high - top * scale + 1
            )
            for left, top, right, bottom in image.boxes
        )


@pytest.mark.parametrize(
    "name",
    ["fake-memo.pdf", "layout-parser-paper-fast.pdf", "multi-column-2p.pdf", "pdflatex-4-pages.pdf", "multi_page.pdf"],
)
def test_spans_of_every_page_are_marked_where_their_words_stand(
    renderer: PageRenderer, parser: DocumentParser, name: str
) -> None:
    parsed = parser.parse_file(DOCUMENTS / name, name)
    num_marked = num_spans = 0
    for page in parsed.pages[:2]:
        text = parsed.text[page.start : page.end]
        for start in range(0, max(1, len(text) - 120), max(1, len(text) // 2)):
            span = text[start : start + 120]
            if sum(c.isalnum() for c in span) < 40:
                continue
            num_spans += 1
            image = draw(renderer, name, parsed, page, start, start + 120)
            if not image.boxes:
                continue
            num_marked += 1
            found = words_in(image, DOCUMENTS / name, page.number)
            inner = [word for word in span.split()[1:-1] if word.isalnum() and len(word) > 3]
            missing = [word for word in inner if word not in found]
            assert len(missing) <= len(inner) // 4, (name, page.number, span, found)
    assert num_spans and num_marked == num_spans, (name, num_marked, num_spans)


def test_the_mark_is_colour_on_the_page_and_nowhere_else(renderer: PageRenderer, parser: DocumentParser) -> None:
    name = "fake-memo.pdf"
    parsed = parser.parse_file(DOCUMENTS / name, name)
    page = parsed.pages[0]
    text = parsed.text[page.start : page.end]
    start = text.index(text.split()[3])
    plain = Image.open(io.BytesIO(draw(renderer, name, parsed, page, 0, 0).png)).convert("RGB")
    marked = draw(renderer, name, parsed, page, start, start + 30)
    coloured = Image.open(io.BytesIO(marked.png)).convert("RGB")
    assert (marked.width, marked.height) == coloured.size == plain.size and plain.width == 1000
    left, top, right, bottom = marked.boxes[0]
    assert 0 <= left < right <= plain.width and 0 <= top < bottom <= plain.height
    assert coloured.getpixel((int(left), int(top))) == (255, 236, 100)
    changed = [
        (x, y)
        for y in range(0, plain.height, 7)
        for x in range(0, plain.width, 7)
        if plain.getpixel((x, y)) != coloured.getpixel((x, y))
    ]
    assert changed and all(
        any(a - 4 <= x <= c + 4 and b - 4 <= y <= d + 4 for a, b, c, d in marked.boxes) for x, y in changed
    )


def test_a_scanned_page_is_drawn_without_a_mark(renderer: PageRenderer) -> None:
    image = renderer.render(DOCUMENTS / "non_text_searchable.pdf", "scan.pdf", 1, page_text="Any words", start=0, end=9)
    assert image.boxes == () and image.png.startswith(b"\x89PNG")


def test_a_turned_page_is_marked_where_it_is_shown(renderer: PageRenderer, tmp_path: Path) -> None:
    path = tmp_path / "turned.pdf"
    with pypdfium2.PdfDocument(DOCUMENTS / "fake-memo.pdf") as document:
        document[0].set_rotation(90)
        text = document[0].get_textpage().get_text_range()
        document.save(path)
    start = len(text) // 2
    upright = renderer.render(DOCUMENTS / "fake-memo.pdf", "m.pdf", 1, page_text=text, start=start, end=start + 12)
    turned = renderer.render(path, "m.pdf", 1, page_text=text, start=start, end=start + 12, width=1000)
    assert turned.width > turned.height and upright.width < upright.height
    (left, top, right, bottom), scale = upright.boxes[0], turned.height / upright.width
    expected = (turned.width - bottom * scale, left * scale, turned.width - top * scale, right * scale)
    assert turned.boxes[0] == pytest.approx(expected, abs=6)


@pytest.mark.parametrize(
    ("name", "page", "code"),
    [
        ("fake-memo.pdf", 99, "no_such_page"),
        ("fake-memo.pdf", 0, "no_such_page"),
        ("fake-text.txt", 1, "damaged"),
        ("libreoffice-writer-password.pdf", 1, "damaged"),
    ],
)
def test_what_cannot_be_drawn_is_named_and_the_next_page_is_drawn(
    renderer: PageRenderer, name: str, page: int, code: str
) -> None:
    with pytest.raises(ParseError) as refused:
        renderer.render(DOCUMENTS / name, name, page)
    assert refused.value.code == code and name in str(refused.value)
    assert renderer.render(DOCUMENTS / "fake-memo.pdf", "fake-memo.pdf", 1).png


def test_a_page_of_any_size_stays_within_the_pixels_that_are_allowed(renderer: PageRenderer, tmp_path: Path) -> None:
    document = pypdfium2.PdfDocument.new()
    document.new_page(10, 14_400)
    document.save(tmp_path / "long.pdf")
    image = renderer.render(tmp_path / "long.pdf", "long.pdf", 1, width=2000)
    assert image.width * image.height <= 6_100_000


def test_drawing_is_ended_at_its_time_limit() -> None:
    renderer = PageRenderer(ParseLimits(timeout_s=0.001))
    try:
        with pytest.raises(ParseError) as refused:
            renderer.render(DOCUMENTS / "layout-parser-paper-fast.pdf", "paper.pdf", 1)
        assert refused.value.code == "timeout"
    finally:
        renderer.close()
