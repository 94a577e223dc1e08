"""The first PDF on a machine that has never read one is read, from a library in a folder that nobody else can write."""

import os
from pathlib import Path

import pytest

from rag.errors import ParseError
from rag.parser_folder import parser_folder
from rag.parsing import parse_file

MEMO = Path(__file__).parents[1] / "data" / "documents" / "fake-memo.pdf"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_the_first_pdf_of_a_machine_is_read(temporary: Path) -> None:
    assert parse_file(MEMO, "memo.pdf").pages
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (library,) = folder.rglob("libpdfium.so")
    unpacked = library.stat().st_mtime_ns
    assert parse_file(MEMO, "memo.pdf").pages
    assert library.stat().st_mtime_ns == unpacked, "the next one takes it as it is"


def test_a_folder_that_others_may_write_to_is_not_used(temporary: Path) -> None:
    parser_folder().chmod(0o777)
    with pytest.raises(RuntimeError, match=r"others may write to it.*Remove it, or set TMPDIR"):
        parse_file(MEMO, "memo.pdf")


def test_a_link_in_its_place_is_not_followed(temporary: Path) -> None:
    folder = parser_folder()
    folder.rmdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(RuntimeError, match="Remove it"):
        parser_folder()


def test_where_the_library_cannot_be_unpacked_no_pdf_is_called_damaged(temporary: Path) -> None:
    # A file where the library's folder should be: nobody can write there, not even root.
    (parser_folder() / "kreuzberg-pdfium").write_text("")
    with pytest.raises(ParseError, match="no PDF can be read here") as caught:
        parse_file(MEMO, "memo.pdf")
    assert caught.value.code == "parser_failed"
    assert os.listdir(temporary) == [parser_folder().name]
