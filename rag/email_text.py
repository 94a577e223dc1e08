"""E-mail messages (.eml) to text: the headers that people read, then the body. Attachments are named, not read."""

from __future__ import annotations

import email
import email.policy
from email.message import EmailMessage

from rag.html_text import html_to_text

_SHOWN_HEADERS = ("Subject", "From", "To", "Cc", "Date")


def email_to_text(data: bytes) -> tuple[str, str | None, tuple[str, ...]]:
    """Text, subject and warnings. Raises `ValueError` where nothing in the file looks like a message."""
    message = email.message_from_bytes(data, policy=email.policy.default)
    if not message.keys():
        raise ValueError("it has no headers")
    headers = [f"{name}: {message[name]}" for name in _SHOWN_HEADERS if message[name]]
    parts = ["\n".join(headers), _body(message).strip()]
    attachments = [part.get_filename() or "without a name" for part in message.iter_attachments()]
    warnings = (f"Attachments were not read: {', '.join(attachments)}.",) if attachments else ()
    return "\n\n".join(part for part in parts if part), message["Subject"], warnings


def _body(message: EmailMessage) -> str:
    body = message.get_body(preferencelist=("plain", "html"))
    if body is None:
        return ""
    try:
        content = str(body.get_content())
    except LookupError:  # A character set that Python does not know.
        payload = body.get_payload(decode=True)
        content = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""
    return html_to_text(content)[0] if body.get_content_subtype() == "html" else content
