"""Every file of the collection of real files behaves as its manifest says; bad ones hurt nobody else."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rag.errors import ParseError
from rag.filenames import MAX_NAME_CHARACTERS, clean_filename
from rag.html_text import html_to_text
from rag.parsing import DocumentParser, ParseLimits, parse_file

ROOT = Path(__file__).parents[2]
DOCUMENTS = ROOT / "tests" / "data" / "documents"
MANIFEST = [json.loads(line) for line in (DOCUMENTS / "manifest.jsonl").read_text().splitlines()]
# What each `expect` allows; a file of 0 bytes is refused as such.
ALLOWED = {
    "text": {"text"},
    "empty": {"empty", "empty_file"},
    "reject": {"encrypted", "empty_file"},
    "text-or-empty": {"text", "empty"},
}
# The reference put a space into a word whose letters lie in two elements: there, spaces are not compared.
WORDS_IN_PIECES = {"example-10k-1p.html"}


@pytest.fixture(scope="module")
def parser() -> Iterator[DocumentParser]:
    with DocumentParser(ParseLimits(timeout_s=30)) as warm:
        yield warm


def normalise(text: str) -> str:
    """As the manifest's phrases are compared: NFKC, lower case, without Markdown's signs, white space collapsed."""
    plain = re.sub(r"[*_#`|\\>~\[\]]|^ *- ", " ", unicodedata.normalize("NFKC", text).lower(), flags=re.MULTILINE)
    return " ".join(plain.split())


@pytest.mark.parametrize("entry", MANIFEST, ids=lambda entry: entry["file"])
def test_every_file_of_the_manifest_behaves_as_expected(parser: DocumentParser, entry: dict[str, Any]) -> None:
    path = DOCUMENTS / entry["file"]
    assert path.stat().st_size == entry["bytes"]
    try:
        document = parser.parse_file(path, entry["file"])
    except ParseError as error:
        assert error.code in ALLOWED[entry["expect"]], error
        assert (error.code == "encrypted") == ("encrypted" in entry["note"])
        return
    outcome = "text" if document.text else "empty"
    assert outcome in ALLOWED[entry["expect"]]
    assert outcome == "text" or document.warnings
    text, wanted = normalise(document.text), [normalise(phrase) for phrase in entry["must_include"]]
    if entry["file"] in WORDS_IN_PIECES:
        text, wanted = text.replace(" ", ""), [phrase.replace(" ", "") for phrase in wanted]
    assert [phrase for phrase in wanted if phrase not in text] == [] or outcome == "empty"
    for page in document.pages:
        assert 0 <= page.start <= page.end <= len(document.text)


def test_pages_are_exact_spans(parser: DocumentParser) -> None:
    document = parser.parse_file(DOCUMENTS / "multi_page.pdf", "multi_page.pdf")
    assert [page.number for page in document.pages] == [1, 2, 3, 4, 5]
    first, second = (document.text[page.start : page.end] for page in document.pages[:2])
    assert first.startswith("The Evolution of the Word Processor") and "The Evolution" not in second


def test_text_files_keep_every_character(parser: DocumentParser, tmp_path: Path) -> None:
    text = 'name,größe\n"a, b",3\n\n  spaced\ttext 漢字 🙂\n'
    file = tmp_path / "any"
    file.write_text(text, encoding="utf-8")
    assert parser.parse_file(file, "table.csv").text == text


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cp1252"])
def test_texts_in_other_encodings_are_read(parser: DocumentParser, tmp_path: Path, codec: str) -> None:
    text = "Die Größe der Schüssel überrascht. Jeder Gast grüßt den Wirt, und später gibt es Käse.\n"
    file = tmp_path / "any"
    file.write_bytes(text.encode(codec))
    assert parser.parse_file(file, "text.txt").text == text


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("a.pdf", b"", "empty_file", "0 bytes"),
        ("a.docx", OLE + "EncryptedPackage".encode("utf-16-le"), "encrypted", "password"),
        ("a.pdf", b"%PDF-1.7\ngarbage", "damaged", "damaged"),
        ("a.docx", b"PK\x03\x04" + bytes(64), "damaged", "damaged"),
        ("a.docx", os.urandom(200) + bytes(8), "damaged", "begin like a Word"),
        ("a.png", PNG, "unknown_type", "PNG picture"),
        ("a.zip", zip_of(readme=b"x"), "unknown_type", "zip archive"),
        ("a.xyz", bytes(range(256)) * 4, "unknown_type", "unknown type"),
        ("a.pdf", PNG, "type_mismatch", "its name says PDF document, its content is a PNG picture"),
        ("a.pdf", b"just words", "type_mismatch", "plain text"),
        ("a.txt", b"%PDF-1.7\n", "type_mismatch", "Rename it to end in .pdf"),
        ("a.txt", PNG, "type_mismatch", "PNG picture"),
        ("a.jpg", b"just words", "type_mismatch", "plain text"),
    ],
)
def test_bad_files_are_refused_with_the_reason(
    parser: DocumentParser, tmp_path: Path, name: str, content: bytes, code: str, says: str
) -> None:
    file = tmp_path / "any"
    file.write_bytes(content)
    with pytest.raises(ParseError) as refused:
        parser.parse_file(file, name)
    assert refused.value.code == code and says in str(refused.value) and name in str(refused.value)


def test_text_of_an_unknown_ending_is_read_as_plain_text(parser: DocumentParser, tmp_path: Path) -> None:
    file = tmp_path / "any"
    file.write_text("BM is how this text begins, like a bitmap.\n")
    assert parser.parse_file(file, "notes.xyz").mime_type == "text/plain"


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "any"
    file.write_bytes(bytes(2000))
    with pytest.raises(ParseError, match="at most") as refused:
        parse_file(file, "big.txt", ParseLimits(max_file_bytes=1000))
    assert refused.value.code == "too_large"


def test_a_file_that_takes_too_long_is_ended_and_the_next_one_read(tmp_path: Path) -> None:
    slow, good = tmp_path / "slow", tmp_path / "good"
    slow.write_text("<p>" + "<b>x</b> <i>y</i>\n" * 500_000)
    good.write_text("Fine.")
    with DocumentParser(ParseLimits(timeout_s=0.3)) as parser:
        with pytest.raises(ParseError, match=r"within 0\.3 s") as refused:
            parser.parse_file(slow, "slow.html")
        assert refused.value.code == "timeout"
        assert parser.parse_file(good, "good.txt").text == "Fine."


def test_a_file_that_takes_too_much_memory_is_ended_and_the_next_one_read(tmp_path: Path) -> None:
    large, good = tmp_path / "large", tmp_path / "good"
    body = b'<p xmlns="urn:oasis:names:tc:opendocument:xmlns:text:1.0">x</p>' * 1_500_000
    office = b'xmlns:o="urn:oasis:names:tc:opendocument:xmlns:office:1.0"'
    large.write_bytes(
        zip_of(
            mimetype=b"application/vnd.oasis.opendocument.text",
            **{"content.xml": b"<o:d " + office + b"><o:body>" + body + b"</o:body></o:d>"},
        )
    )
    good.write_text("Fine.")
    with DocumentParser(ParseLimits(memory_bytes=192 << 20)) as parser:
        with pytest.raises(ParseError, match="memory") as refused:
            parser.parse_file(large, "large.odt")
        assert refused.value.code == "out_of_memory"
        assert parser.parse_file(good, "good.txt").text == "Fine."


def test_a_file_that_takes_too_much_processor_time_is_ended_and_the_next_one_read(tmp_path: Path) -> None:
    slow, good = tmp_path / "slow", tmp_path / "good"
    slow.write_text("<p>" + "<b>x</b> <i>y</i>\n" * 2_000_000)
    good.write_text("Fine.")
    with DocumentParser(ParseLimits(timeout_s=120, cpu_s=1)) as parser:
        with pytest.raises(ParseError, match="1 s of processor time") as refused:
            parser.parse_file(slow, "slow.html")
        assert refused.value.code == "timeout"
        assert parser.parse_file(good, "good.txt").text == "Fine."


OPEN_DOCUMENT = (
    '<o:d xmlns:o="urn:oasis:names:tc:opendocument:xmlns:office:1.0" '
    'xmlns:t="urn:oasis:names:tc:opendocument:xmlns:text:1.0"><o:body>{}</o:body></o:d>'
)
NESTED = {
    "a.html": lambda depth: ("<div>" * depth + "<p>innermost" + "</div>" * depth).encode(),
    "b.html": lambda depth: ("<table><tr><td>" * depth + "innermost" + "</td></tr></table>" * depth).encode(),
    "c.html": lambda depth: ("<ul><li>" * depth + "innermost" + "</li></ul>" * depth).encode(),
    "a.xml": lambda depth: ("<a>" * depth + "innermost" + "</a>" * depth).encode(),
    "a.json": lambda depth: ("[" * depth + '"innermost"' + "]" * depth).encode(),
    "a.yaml": lambda depth: ("[" * depth + "innermost" + "]" * depth).encode(),
    "a.md": lambda depth: ("> " * depth + "innermost").encode(),
    "a.eml": lambda depth: (
        b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(depth))
        + b"Content-Type: text/plain\n\ninnermost\n"
    ),
    "a.odt": lambda depth: zip_of(
        mimetype=b"application/vnd.oasis.opendocument.text",
        **{
            "content.xml": OPEN_DOCUMENT.format(
                "<t:section>" * depth + "<t:p>innermost</t:p>" + "</t:section>" * depth
            ).encode()
        },
    ),
    "b.odt": lambda depth: zip_of(
        mimetype=b"application/vnd.oasis.opendocument.text",
        **{
            "content.xml": OPEN_DOCUMENT.format(
                "<t:p>" + "<t:span>" * depth + "innermost" + "</t:span>" * depth + "</t:p>"
            ).encode()
        },
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_a_hundred_levels_of_nesting_are_read(parser: DocumentParser, tmp_path: Path, name: str) -> None:
    file = tmp_path / "any"
    file.write_bytes(NESTED[name](100))
    assert "innermost" in parser.parse_file(file, name).text


@pytest.mark.parametrize("name", NESTED)
def test_a_hundred_thousand_levels_are_read_or_refused(parser: DocumentParser, tmp_path: Path, name: str) -> None:
    file = tmp_path / "any"
    file.write_bytes(NESTED[name](100_000))
    try:
        parser.parse_file(file, name)
    except ParseError as error:
        assert error.code in ("damaged", "timeout", "out_of_memory", "too_large")
    file.write_text("Fine.")
    assert parser.parse_file(file, "good.txt").text == "Fine."


def test_a_killed_parser_process_is_replaced(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_text("Fine.")
    with DocumentParser(ParseLimits()) as parser:
        parser.parse_file(good, "good.txt")
        os.kill(parser_processes(os.getpid())[0], signal.SIGKILL)
        # The first call may still meet the dying process; it says so, and the next one has a new process.
        try:
            parser.parse_file(good, "good.txt")
        except ParseError as error:
            assert error.code == "parser_failed"
        assert parser.parse_file(good, "good.txt").text == "Fine."


def test_closing_ends_a_file_in_the_middle(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("<p>" + "<b>x</b> <i>y</i>\n" * 2_000_000)
    parser = DocumentParser(ParseLimits(timeout_s=60))
    closer = threading.Timer(2.0, parser.close)
    closer.start()
    with pytest.raises(ParseError):
        parser.parse_file(slow, "slow.html")
    closer.join()
    assert parser_processes(os.getpid()) == []


def test_parser_processes_do_not_outlive_their_owner(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("<p>" + "<b>x</b> <i>y</i>\n" * 2_000_000)
    program = (
        "import sys; from pathlib import Path; from rag.parsing import DocumentParser, ParseLimits\n"
        f"DocumentParser(ParseLimits()).parse_file(Path({str(slow)!r}), 'slow.html')"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    processes = wait_for(lambda: family if len(family := parser_processes(owner.pid)) == 2 else None)
    owner.kill()
    owner.wait()
    wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in processes) or None)


def parser_processes(owner: int) -> list[int]:
    """The parser process of an owner and its child, if it has one."""
    found = children(owner, b"rag.parser_process")
    return found + [grandchild for child in found for grandchild in children(child, b"")]


def children(parent: int, command: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                is_child = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
                if is_child and command in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def wait_for(look: Any, timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while (found := look()) is None:
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("report.pdf", "report.pdf"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\plan.docx", "plan.docx"),
        ("evil\u202efdp.exe", "evilfdp.exe"),
        ("nul\x00byte.txt", "nulbyte.txt"),
        ("two\nlines  and\tmore.txt", "two lines and more.txt"),
        ("Gru\u0308ße.md", "Grüße.md"),
        ("dir/", "dir"),
    ],
)
def test_file_names_are_cleaned_for_display(name: str, cleaned: str) -> None:
    assert clean_filename(name) == cleaned


def test_long_file_names_keep_their_ending() -> None:
    cleaned = clean_filename("x" * 5000 + ".pdf")
    assert len(cleaned) <= MAX_NAME_CHARACTERS and cleaned.endswith("….pdf")


@pytest.mark.parametrize("name", ["", "..", "/", "\u202e", "\x00"])
def test_what_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ParseError, match="not a file name"):
        clean_filename(name)


def test_web_pages_become_headings_lists_and_rows() -> None:
    html = """<html><head><title>A  page</title><style>p {}</style></head><body>
      <h2>First<br>part</h2><p>Some <b>bold</b><a href="x"> link</a>.</p><script>no()</script>
      <ul><li>one</li><li><p>two</p></li></ul><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
      <pre>x = 1\n  y = 2</pre></body></html>"""
    text, title = html_to_text(html)
    assert title == "A page"
    assert text == "## First part\n\nSome bold link.\n\n- one\n- two\n\na | b\n1 | 2\n\nx = 1\n  y = 2"
