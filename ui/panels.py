"""HTML of the lists beside the chat: conversations, sources with their passage, documents, uploads.

Everything that comes from people, files and models goes through `escape`. Buttons carry `data-` attributes; the page's
script turns clicks on them into events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ui.markup import escape
from ui.records import Citation, Conversation, Document, DocumentView, Job, PageImage

_ICONS = {
    "menu": "M4 6h16M4 12h16M4 18h16",
    "rename": "M4 20h4L19 9l-4-4L4 16v4z",
    "delete": "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
    "documents": "M6 3h8l4 4v14H6zM14 3v4h4M9 12h6M9 16h6",
    "sources": "M4 5h7v14H4zM13 5h7v14h-7zM7 9h1M16 9h1",
    "theme": "M12 3a9 9 0 1 0 9 9 7 7 0 0 1-9-9z",
    "attach": "M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.3 3.3 0 0 1 4.7 4.7L9.5 17a1.7 1.7 0 0 1-2.4-2.4L14.5 7",
    "close": "M6 6l12 12M18 6L6 18",
    "sign-out": "M9 4H5v16h4M15 8l4 4-4 4M19 12H9",
}

_STATES = {
    "sending": "Sending",
    "queued": "Waiting",
    "parsing": "Reading",
    "embedding": "Indexing",
    "done": "Ready",
    "failed": "Not added",
    "cancelled": "Cancelled",
}


@dataclass(frozen=True, slots=True)
class Upload:
    """One line of the upload list."""

    filename: str
    state: str = "sending"
    progress: float = 0.0
    note: str = ""


def icon_button(icon: str, label: str, action: str, **data: str) -> str:
    attributes = "".join(f' data-{name.replace("_", "-")}="{escape(value)}"' for name, value in data.items())
    return (
        f'<button type="button" class="wf-icon" data-action="{escape(action)}"{attributes} '
        f'aria-label="{escape(label)}" title="{escape(label)}">{_svg(icon)}</button>'
    )


def brand() -> str:
    return (
        '<div class="wf-brand"><svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 12V22M12 12C12 7 13 4 15 2'
        "c1 3 0 7-3 10zM12 12c4-2 8-2 10 0-2 2-6 2-10 0zM12 12c-4 2-8 2-10 0 2-2 6-2 10 0z"
        '"/></svg><span>windfarm</span></div>'
    )


def account(name: str) -> str:
    return (
        f'<div class="wf-account"><span class="wf-avatar" aria-hidden="true">{escape(name[:1].upper())}</span>'
        f'<span class="wf-name">{escape(name)}</span>'
        f"{icon_button('theme', 'Switch between light and dark', 'theme')}"
        f"{icon_button('sign-out', 'Sign out', 'sign-out')}</div>"
    )


def conversation_list(conversations: Sequence[Conversation], current_id: str) -> str:
    if not conversations:
        return '<p class="wf-empty">Your conversations will be listed here.</p>'
    items = "".join(_conversation(conversation, current_id) for conversation in conversations)
    return f'<ul class="wf-conversations" aria-label="Conversations">{items}</ul>'


def _conversation(conversation: Conversation, current_id: str) -> str:
    is_current = conversation.id == current_id
    current = ' aria-current="page"' if is_current else ""
    title, id = escape(conversation.title), escape(conversation.id)
    return (
        f'<li class="wf-conversation{" is-current" if is_current else ""}" data-id="{id}">'
        f'<button type="button" class="wf-open" data-action="open"{current} title="{title}">{title}</button>'
        f"{icon_button('rename', f'Rename: {conversation.title}', 'rename')}"
        f"{icon_button('delete', f'Delete: {conversation.title}', 'delete')}</li>"
    )


def source_list(citations: Sequence[Citation], message_id: str, opened: int | None = None, view: str = "") -> str:
    """The citations of one answer; `view` is the HTML below the opened one."""
    if not citations:
        return (
            '<p class="wf-empty">When an answer cites your documents, its sources appear here. '
            "Choose collections below the question to ask your documents.</p>"
        )
    cards = "".join(_source(citation, citation.number == opened, view) for citation in citations)
    return f'<ol class="wf-sources" data-message="{escape(message_id)}">{cards}</ol>'


def unsupported_list(sentences: Sequence[str]) -> str:
    """Sentences of an answer that no passage says; nothing where there are none."""
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(_shortened(sentence))}</li>" for sentence in sentences)
    return (
        '<div class="wf-unsupported"><p class="wf-note">Not confirmed by your documents:</p>'
        f'<ul aria-label="Sentences without a source">{items}</ul></div>'
    )


def _source(citation: Citation, is_open: bool, view: str) -> str:
    facts = [f"Page {citation.page}"] if citation.page is not None else []
    facts += [f"Score {citation.score:.2f}"] if citation.score is not None else []
    facts += [escape(citation.collection)] if citation.collection else []
    body = view if is_open else f'<p class="wf-snippet">{escape(_shortened(citation.text))}</p>'
    return (
        f'<li class="wf-source{" is-open" if is_open else ""}">'
        f'<button type="button" class="wf-source-head" data-action="cite" data-number="{citation.number}" '
        f'aria-expanded="{str(is_open).lower()}">'
        f'<span class="wf-number">{citation.number}</span>'
        f'<span class="wf-source-name">{escape(citation.document)}<small>{" · ".join(facts)}</small></span></button>'
        f"{body}</li>"
    )


def passage_view(view: DocumentView, citation: Citation) -> str:
    """The passage marked on its page, or inside the text around it."""
    if not view.is_current or view.marked.strip() != citation.text.strip():
        return (
            f'<div class="wf-passage"><p><mark>{escape(citation.text)}</mark></p></div>'
            '<p class="wf-note">The document has changed since this answer; this is the passage that was cited.</p>'
        )
    if view.image is not None:
        return _page(view, view.image)
    before = ("" if view.is_beginning else "… ") + view.before.lstrip()
    after = view.after.rstrip() + ("" if view.is_end else " …")
    return (
        '<div class="wf-passage" tabindex="0" role="region" aria-label="Passage in its document">'
        f"{escape(before)}<mark>{escape(view.marked)}</mark>{escape(after)}</div>"
    )


def _page(view: DocumentView, image: PageImage) -> str:
    """The drawn page; a press on it makes it larger. The empty mark is where the page is scrolled to."""
    what = "the cited passage is marked" if image.first_mark is not None else "the passage is not marked"
    spot = ""
    note = "This page shows the passage as a picture or in another form, so it cannot be marked. It says: "
    quote = f'<p class="wf-note">{note}<mark>{escape(view.marked)}</mark></p>' if image.first_mark is None else ""
    if image.first_mark is not None:
        spot = f'<mark class="wf-spot" style="top:{100 * image.first_mark:.2f}%"></mark>'
    return (
        '<div class="wf-passage wf-page" tabindex="0" role="region" aria-label="Page of the document">'
        '<label><input type="checkbox" class="wf-zoom" aria-label="Larger page"><span class="wf-sheet">'
        f'<img src="data:image/png;base64,{escape(image.png_base64)}" width="{image.width}" height="{image.height}" '
        f'alt="Page {view.page} of {escape(view.name)}; {what}.">{spot}</span></label></div>{quote}'
    )


def passage_unavailable(citation: Citation, reason: str) -> str:
    return (
        f'<div class="wf-passage"><mark>{escape(citation.text)}</mark></div>'
        f'<p class="wf-note">The whole document cannot be shown: {escape(reason)}</p>'
    )


def document_list(collection: str, documents: Sequence[Document], refusals: str = "") -> str:
    """The documents; `refusals` says how often the collection refuses wrongly, where that was measured."""
    if not documents:
        return f'<p class="wf-empty">“{escape(collection)}” holds no documents yet.</p>'
    items = "".join(
        f'<li data-id="{escape(document.id)}"><span class="wf-file">{escape(document.name)}</span>'
        f"<small>{_passages(document.num_chunks)}</small>"
        f"{icon_button('delete', f'Delete: {document.name}', 'delete')}</li>"
        for document in documents
    )
    note = f'<p class="wf-note">{escape(refusals)}</p>' if refusals else ""
    return f'{note}<ul class="wf-documents" aria-label="Documents">{items}</ul>'


def upload_list(uploads: Sequence[Upload]) -> str:
    if not uploads:
        return ""
    items = "".join(_upload(upload) for upload in uploads)
    return f'<ul class="wf-uploads" aria-label="Uploads" aria-live="polite">{items}</ul>'


def upload_of(job: Job) -> Upload:
    """What the list says about a job."""
    if job.state == "done":
        note = "Already there, nothing to do" if job.is_unchanged else _passages(job.num_chunks)
        return Upload(job.filename, "done", 1.0, ". ".join([note, *job.warnings]) if note else "")
    if job.state in ("failed", "cancelled"):
        return Upload(job.filename, job.state, 1.0, job.error or "No reason was given.")
    return Upload(job.filename, job.state, job.progress)


def _upload(upload: Upload) -> str:
    percent = round(100 * max(0.0, min(1.0, upload.progress)))
    state = _STATES.get(upload.state, upload.state)
    is_running = upload.state not in ("done", "failed", "cancelled")
    bar = (
        f'<div class="wf-bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="{escape(upload.filename)}"><span style="width:{max(percent, 4)}%"></span></div>'
    )
    return (
        f'<li class="wf-upload is-{escape(upload.state)}"><div><span class="wf-file">{escape(upload.filename)}</span>'
        f"<small>{escape(state)}{f' {percent} %' if is_running and percent else ''}</small></div>"
        f"{bar if is_running else ''}{f'<p>{escape(upload.note)}</p>' if upload.note else ''}</li>"
    )


def notice(text: str, kind: str = "error") -> str:
    """A sentence in a box; nothing for an empty text."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="wf-notice is-{kind}" role="{role}">{escape(text)}</p>' if text else ""


def _passages(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count} passage{'' if count == 1 else 's'}"


def _shortened(text: str, length: int = 220) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else f"{flat[:length].rsplit(' ', 1)[0]} …"


def _svg(icon: str) -> str:
    return f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{_ICONS[icon]}"/></svg>'
