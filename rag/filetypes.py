"""What a file is: by its first bytes, and by its name where the bytes leave a choice (plain text formats).

A name that promises another type than the bytes hold is refused instead of guessed: whoever uploads `report.pdf`
that is a picture should hear so. Nothing here reads more than names and headers of a file.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

from rag.errors import ParseError
from rag.filenames import extension_of


@dataclass(frozen=True, slots=True)
class FileType:
    """A type that can be read. `label` is for people; `extensions` are the names that may carry it."""

    mime_type: str
    label: str
    extensions: tuple[str, ...]
    is_text: bool = False


_OFFICE = "application/vnd.openxmlformats-officedocument."
_OPEN_DOCUMENT = "application/vnd.oasis.opendocument."

PDF = FileType("application/pdf", "PDF document", ("pdf",))
DOCX = FileType(f"{_OFFICE}wordprocessingml.document", "Word document", ("docx", "docm", "dotx"))
XLSX = FileType(f"{_OFFICE}spreadsheetml.sheet", "Excel workbook", ("xlsx", "xlsm", "xltx"))
PPTX = FileType(f"{_OFFICE}presentationml.presentation", "PowerPoint presentation", ("pptx", "pptm", "ppsx"))
DOC = FileType("application/msword", "Word 97-2003 document", ("doc", "dot"))
XLS = FileType("application/vnd.ms-excel", "Excel 97-2003 workbook", ("xls", "xlt"))
PPT = FileType("application/vnd.ms-powerpoint", "PowerPoint 97-2003 presentation", ("ppt", "pps"))
MSG = FileType("application/vnd.ms-outlook", "Outlook message", ("msg",))
ODT = FileType(f"{_OPEN_DOCUMENT}text", "OpenDocument text", ("odt", "ott"))
ODS = FileType(f"{_OPEN_DOCUMENT}spreadsheet", "OpenDocument spreadsheet", ("ods",))
ODP = FileType(f"{_OPEN_DOCUMENT}presentation", "OpenDocument presentation", ("odp",))
EPUB = FileType("application/epub+zip", "EPUB book", ("epub",))
RTF = FileType("application/rtf", "RTF document", ("rtf",))

HTML = FileType("text/html", "web page", ("html", "htm", "xhtml"), is_text=True)
EMAIL = FileType("message/rfc822", "e-mail message", ("eml",), is_text=True)
NOTEBOOK = FileType("application/x-ipynb+json", "Jupyter notebook", ("ipynb",), is_text=True)
XML = FileType("application/xml", "XML document", ("xml", "rss", "atom"), is_text=True)
MARKDOWN = FileType("text/markdown", "Markdown text", ("md", "markdown", "mdx"), is_text=True)
PLAIN = FileType("text/plain", "plain text", ("txt", "text", "log"), is_text=True)
_TEXT_TYPES = (
    HTML,
    EMAIL,
    NOTEBOOK,
    XML,
    MARKDOWN,
    PLAIN,
    FileType("text/csv", "CSV table", ("csv",), is_text=True),
    FileType("text/tab-separated-values", "TSV table", ("tsv", "tab"), is_text=True),
    FileType("application/json", "JSON document", ("json", "jsonl", "ndjson"), is_text=True),
    FileType("application/yaml", "YAML document", ("yaml", "yml"), is_text=True),
    FileType("text/x-rst", "reStructuredText", ("rst",), is_text=True),
    FileType("text/x-org", "Org text", ("org",), is_text=True),
    FileType("text/vtt", "subtitles", ("vtt",), is_text=True),
    FileType("application/x-subrip", "subtitles", ("srt",), is_text=True),
)
_BINARY_TYPES = (PDF, DOCX, XLSX, PPTX, DOC, XLS, PPT, MSG, ODT, ODS, ODP, EPUB, RTF)
_BY_EXTENSION = {ending: kind for kind in (*_BINARY_TYPES, *_TEXT_TYPES) for ending in kind.extensions}
_BY_MIME = {kind.mime_type: kind for kind in (*_BINARY_TYPES, *_TEXT_TYPES)}

# First bytes of common files that hold no text, with the endings that they usually have.
_UNREADABLE: tuple[tuple[bytes, str, tuple[str, ...]], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG picture", ("png",)),
    (b"\xff\xd8\xff", "JPEG picture", ("jpg", "jpeg")),
    (b"GIF8", "GIF picture", ("gif",)),
    (b"II*\x00", "TIFF picture", ("tif", "tiff")),
    (b"MM\x00*", "TIFF picture", ("tif", "tiff")),
    (b"BM", "BMP picture", ("bmp",)),
    (b"RIFF", "media file", ("webp", "wav", "avi")),
    (b"ID3", "sound file", ("mp3",)),
    (b"OggS", "sound file", ("ogg", "opus")),
    (b"fLaC", "sound file", ("flac",)),
    (b"\x1aE\xdf\xa3", "video file", ("mkv", "webm")),
    (b"\x1f\x8b", "gzip archive", ("gz", "tgz")),
    (b"BZh", "bzip2 archive", ("bz2",)),
    (b"\xfd7zXZ\x00", "xz archive", ("xz",)),
    (b"\x28\xb5\x2f\xfd", "zstd archive", ("zst",)),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip archive", ("7z",)),
    (b"Rar!", "RAR archive", ("rar",)),
    (b"\x7fELF", "program", ("so",)),
    (b"MZ", "program", ("exe", "dll")),
    (b"SQLite format 3\x00", "SQLite database", ("sqlite", "db")),
    (b"GGUF", "model file", ("gguf",)),
)
_UNREADABLE_EXTENSIONS = {ending: label for _, label, endings in _UNREADABLE for ending in endings} | {
    "zip": "zip archive",
    "tar": "tar archive",
    "mp4": "video file",
    "mov": "video file",
}


def endings_by_mime_type() -> dict[str, tuple[str, ...]]:
    """The types that can be read with the name endings that they may have, the usual one first."""
    return {kind.mime_type: kind.extensions for kind in _BY_MIME.values()}


def detect_type(data: bytes, name: str) -> FileType:
    """The type of a file from its bytes and name. Raises `ParseError` with code `empty_file`, `encrypted`,
    `damaged`, `unknown_type` or `type_mismatch`."""
    if not data:
        raise ParseError(f"{name} is empty (0 bytes). Check the file and upload it again.", code="empty_file")
    promised = _BY_EXTENSION.get(extension_of(name))
    found = _detect_container(data, name)
    if found is None:
        return _detect_text(data, name, promised)
    if promised is not None and promised != found:
        raise _mismatch(name, promised.label, f"a {found.label}", found.extensions[0])
    if extension_of(name) in _UNREADABLE_EXTENSIONS:
        raise _mismatch(name, _UNREADABLE_EXTENSIONS[extension_of(name)], f"a {found.label}", found.extensions[0])
    return found


def _detect_container(data: bytes, name: str) -> FileType | None:
    """The type of a file that has a telling header; none where it may be text."""
    if b"%PDF-" in data[:1024]:
        return PDF
    if data.startswith(b"PK\x03\x04"):
        return _detect_zip(data, name)
    if data.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return _detect_ole(data, name)
    if data.startswith(b"{\\rtf"):
        return RTF
    return None


def _detect_zip(data: bytes, name: str) -> FileType:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = set(archive.namelist())
            if any(entry.flag_bits & 0x1 for entry in archive.infolist()):
                raise encrypted(name)
            kind = _office_type(names) or _declared_type(archive, names)
            if kind in (ODT, ODS, ODP) and _is_encrypted_open_document(archive, names):
                raise encrypted(name)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise damaged(name, str(error)) from error
    if kind is None:
        raise _unreadable(name, "zip archive")
    return kind


def _office_type(names: set[str]) -> FileType | None:
    if "[Content_Types].xml" not in names:
        return None
    for folder, kind in (("word/", DOCX), ("xl/", XLSX), ("ppt/", PPTX)):
        if any(entry.startswith(folder) for entry in names):
            return kind
    return None


def _declared_type(archive: zipfile.ZipFile, names: set[str]) -> FileType | None:
    """OpenDocument and EPUB name their type in a small member called `mimetype`."""
    if "mimetype" not in names or archive.getinfo("mimetype").file_size > 200:
        return None
    declared = archive.read("mimetype").decode("ascii", "replace").strip()
    return _BY_MIME.get(declared.removesuffix("-template"))


def _is_encrypted_open_document(archive: zipfile.ZipFile, names: set[str]) -> bool:
    manifest = "META-INF/manifest.xml"
    if manifest not in names or archive.getinfo(manifest).file_size > 1_000_000:
        return False
    return b"encryption-data" in archive.read(manifest)


def _detect_ole(data: bytes, name: str) -> FileType:
    """Old Office files are small file systems; their stream names tell the program."""

    def holds(stream: str) -> bool:
        return stream.encode("utf-16-le") in data

    if holds("EncryptedPackage"):
        raise encrypted(name)
    for stream, kind in (
        ("__substg1.0_", MSG),
        ("WordDocument", DOC),
        ("PowerPoint Document", PPT),
        ("Workbook", XLS),
        ("Book", XLS),
    ):
        if holds(stream):
            return kind
    raise _unreadable(name, "compound file of an unknown program")


def _detect_text(data: bytes, name: str, promised: FileType | None) -> FileType:
    """A file without a telling header: text, or something that cannot be read."""
    content = _describe_unreadable(data)
    if content is None and not looks_like_text(data):
        content = "binary file of unknown type"
    ending = extension_of(name)
    if content is not None:
        if promised is not None and (promised.is_text or content != "binary file of unknown type"):
            raise _mismatch(name, promised.label, f"a {content}", None)
        if promised is not None:
            raise damaged(name, f"it does not begin like a {promised.label}")
        raise _unreadable(name, content)
    if promised is not None and not promised.is_text:
        raise _mismatch(name, promised.label, "plain text", "txt")
    if ending in _UNREADABLE_EXTENSIONS:
        raise _mismatch(name, _UNREADABLE_EXTENSIONS[ending], "plain text", "txt")
    return promised or _sniff_text(data)


def _describe_unreadable(data: bytes) -> str | None:
    for magic, label, _ in _UNREADABLE:
        # Two-letter marks also begin ordinary words: they count only where the file is binary.
        if data.startswith(magic) and (len(magic) > 3 or not looks_like_text(data)):
            return label
    if data[4:8] == b"ftyp":
        return "video file"
    return "tar archive" if data[257:262] == b"ustar" else None


def looks_like_text(data: bytes) -> bool:
    """Whether bytes can be text in some encoding: UTF-16 and UTF-32 by mark or pattern, otherwise few control bytes."""
    sample = data[:65536]
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")) or utf16_without_mark(sample) is not None:
        return True
    if b"\x00" in sample:
        return False
    num_controls = sum(byte < 32 and byte not in (7, 8, 9, 10, 11, 12, 13, 27) for byte in sample)
    return num_controls <= len(sample) // 100


def utf16_without_mark(sample: bytes) -> str | None:
    """Codec of UTF-16 text without a byte order mark: mostly Latin text has a zero in every other byte."""
    even, odd = sample[0::2], sample[1::2]
    if len(sample) < 4 or not odd:
        return None
    zeros_even, zeros_odd = even.count(0) / len(even), odd.count(0) / len(odd)
    if zeros_odd > 0.6 and zeros_even < 0.05:
        return "utf-16-le"
    return "utf-16-be" if zeros_even > 0.6 and zeros_odd < 0.05 else None


def _sniff_text(data: bytes) -> FileType:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return HTML
    return XML if head.startswith(b"<?xml") else PLAIN


def encrypted(name: str) -> ParseError:
    return ParseError(
        f"{name} is encrypted: a password is needed to open it. Save a copy without a password and upload that.",
        code="encrypted",
    )


def damaged(name: str, detail: str) -> ParseError:
    return ParseError(
        f"{name} is damaged and cannot be read ({detail}). Open it in its own program, save it again and upload that.",
        code="damaged",
    )


def _unreadable(name: str, content: str) -> ParseError:
    readable = "PDF, Word, Excel, PowerPoint, OpenDocument, EPUB, RTF, HTML, e-mail, Markdown, CSV, JSON and plain text"
    return ParseError(
        f"{name} is a {content}, which holds no text to search. Readable are {readable}.", code="unknown_type"
    )


def _mismatch(name: str, promised: str, content: str, ending: str | None) -> ParseError:
    advice = f"Rename it to end in .{ending}" if ending else "Check that it is the right file"
    return ParseError(
        f"{name} is named like another type: its name says {promised}, its content is {content}. "
        f"{advice} and upload it again.",
        code="type_mismatch",
    )
