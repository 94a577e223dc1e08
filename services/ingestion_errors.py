"""What ends a job of the ingestion and what its callers hear: stable codes, messages with the next step."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from sqlalchemy.exc import OperationalError

from rag.errors import EmbedderUnavailable, EmbeddingMismatch, ParseError, StoreError
from services.errors import ApiError, conflict, invalid
from services.web.errors import FetchError


class Cancelled(Exception):
    """The job was cancelled, or its collection or document deleted, while it ran."""


class Paused(Exception):
    """The job was paused before it began."""


def reason_of(error: Exception) -> tuple[str, str]:
    """Stable code and message of what ended a job."""
    cause = error.orig if isinstance(error, OperationalError) else error
    text = str(cause)
    if isinstance(error, ParseError | FetchError):
        return error.code, text
    if (
        (isinstance(cause, OSError) and cause.errno == errno.ENOSPC)
        or "disk is full" in text
        or "No space left" in text
    ):
        return "disk_full", "The disk is full; the file was not stored. Free some space and upload it again."
    if isinstance(error, EmbeddingMismatch):
        return "embedding_mismatch", text
    if isinstance(error, EmbedderUnavailable | TimeoutError):
        return "embedding_unavailable", f"The embedding model did not answer: {text}. Upload the file again later."
    if isinstance(error, FileNotFoundError):
        return "upload_lost", "The uploaded file is gone from the data folder. Upload it again."
    if isinstance(error, StoreError):
        return "store_error", text
    return "internal_error", f"Something went wrong inside windfarm ({type(error).__name__}); the log says more."


@contextlib.contextmanager
def as_api_errors() -> Iterator[None]:
    """What a caller hears of problems that show before there is a job."""
    try:
        yield
    except ParseError as error:
        raise invalid(str(error), param="file", code=error.code) from error
    except FetchError as error:
        raise invalid(str(error), param="url", code=error.code) from error
    except EmbeddingMismatch as error:
        raise conflict(str(error), code="embedding_mismatch", param="collection") from error
    except OperationalError as error:
        if "disk is full" in str(error.orig):
            message = "The disk of the database is full; nothing was stored. Free some space and try again."
            raise ApiError(507, "insufficient_storage", "disk_full", message) from error
        raise
