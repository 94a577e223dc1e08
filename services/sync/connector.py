"""What a synchronisation keeps a collection in step with: the interface of connectors, and the records that it speaks.

A connector lists everything that should be in the collection and hands out the content of single items. What is new,
changed or gone is decided elsewhere, by one rule for all connectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from services.setup_errors import SetupError


class ConnectorError(SetupError):
    """A source, or one item of it, cannot be read. The message names the cause and the next step."""


@dataclass(frozen=True, slots=True)
class Item:
    """One file of a source.

    `name` is the document's name, unique in the source; `origin` says where exactly it comes from. An item is known to
    be unchanged where its `content_sha256` or its `origin_is_exact` origin is that of the document, or where it was not
    modified since (`modified_at`, seconds since 1970); otherwise it is sent, and windfarm finds out.
    """

    name: str
    origin: str
    num_bytes: int = 0
    content_sha256: str | None = None
    origin_is_exact: bool = False
    modified_at: float | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """`parse_as`: a name with the ending of the type, where the document's name has none."""

    data: Path | bytes
    parse_as: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """What lies in a source and is left out, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    items: Sequence[Item]
    skipped: Sequence[Skipped] = ()


class Connector(Protocol):
    """Use as a context manager. Methods block."""

    @property
    def source(self) -> str:
        """Names the source in the collection: documents that carry it belong to this synchronisation alone."""

    @property
    def interval_s(self) -> float:
        """How often to look again."""

    def list_items(self) -> Listing:
        """Everything that is there now. Raises `ConnectorError` where that cannot be known: nothing is deleted then."""

    def content(self, item: Item) -> Content:
        """Raises `ConnectorError`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
