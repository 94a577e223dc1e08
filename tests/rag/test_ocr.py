"""Scanned PDFs say that they are scans, and are read where the operator asks for text recognition."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag.errors import ParseError
from rag.parsing import ParseLimits, parse_file

SCAN = Path(__file__).parents[1] / "data" / "documents" / "non_text_searchable.pdf"
# Stands for tesseract in what it is given and gives: a picture on its input, text on its output.
STAND_IN = """#!/bin/sh
[ "$1 $2 $3 $4" = "stdin stdout -l eng" ] || { echo "wrong: $*" >&2; exit 1; }
[ "$(head -c 2)" = "P5" ] || exit 1
cat > /dev/null
echo "Recognised by $OMP_THREAD_LIMIT thread."
"""


def limits(program: Path | str, languages: str | None = "eng") -> ParseLimits:
    return ParseLimits(ocr_languages=languages, ocr_program=str(program))


def stand_in(folder: Path, text: str = STAND_IN) -> Path:
    program = folder / "tesseract"
    program.write_text(text)
    program.chmod(0o755)
    return program


def test_without_text_recognition_a_scan_is_said_to_be_one() -> None:
    document = parse_file(SCAN, "scan.pdf")
    assert document.text == "" and "no text layer" in document.warnings[0]


def test_a_scan_is_read_page_by_page_where_it_is_asked_for(tmp_path: Path) -> None:
    document = parse_file(SCAN, "scan.pdf", limits(stand_in(tmp_path)))
    assert document.text.startswith("Recognised by 1 thread.")
    assert document.pages[0].number == 1
    assert [document.text[page.start : page.end] for page in document.pages] == ["Recognised by 1 thread."] * len(
        document.pages
    )
    assert "may hold mistakes" in document.warnings[0]


def test_a_file_with_a_text_layer_is_not_recognised(tmp_path: Path) -> None:
    document = parse_file(SCAN.with_name("multi_page.pdf"), "pages.pdf", limits(stand_in(tmp_path)))
    assert "Recognised" not in document.text


def test_missing_text_recognition_is_said_with_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ParseError, match="apt-get install tesseract-ocr") as refused:
        parse_file(SCAN, "scan.pdf", limits(tmp_path / "nothing"))
    assert refused.value.code == "ocr_missing"


def test_failing_text_recognition_says_why(tmp_path: Path) -> None:
    with pytest.raises(ParseError, match=r"wrong: stdin stdout -l xyz.*ocr_languages \(xyz\)") as refused:
        parse_file(SCAN, "scan.pdf", limits(stand_in(tmp_path), "xyz"))
    assert refused.value.code == "ocr_failed"
