"""A conversation as the chat shows it: text, tool steps and notices as bubbles. The same code draws stored and live
answers, so that a reload changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ui.markup import code_block, link_marks, mark_places, plain_markdown, safe_markdown
from ui.records import Message, ToolStep, Trimmed

Bubble = dict[str, Any]

_NOTICES = {
    "stopped": ("Stopped", "You stopped this answer. What was written until then is kept."),
    "failed": ("This answer broke off", "The server could not finish it. Use the retry button below to ask again."),
}


def bubbles(messages: Sequence[Message], *, doing: str | None = None) -> list[Bubble]:
    """All bubbles of a conversation; `doing` is what the running answer is busy with."""
    drawn = [bubble for message in messages for bubble in _message(message)]
    if doing:
        drawn.append(_folded(doing, " ", is_running=True))
    return drawn


def error_bubble(reason: str) -> Bubble:
    return _folded("No answer", safe_markdown(reason), is_open=True)


def _message(message: Message) -> list[Bubble]:
    if message.role != "assistant":
        return [{"role": "user", "content": safe_markdown(message.content)}]
    drawn = [_step(step) for step in message.steps]
    if message.trimmed:
        drawn.append(_trimmed(message.trimmed))
    if message.query:
        drawn.append(_folded("Searched for more than the last question", safe_markdown(message.query)))
    if message.evidence == "none":
        drawn.append(_no_evidence())
    if message.content:
        drawn.append({"role": "assistant", "content": _answer(message)})
    if message.evidence == "quoted":
        drawn.append(_quoted())
    elif message.evidence == "found" and message.content and not message.citations and message.state == "complete":
        drawn.append(_unconfirmed())
    if notice := _NOTICES.get(message.state):
        drawn.append(_folded(*notice))
    return drawn


def _answer(message: Message) -> str:
    numbers = {citation.number for citation in message.citations}
    text = mark_places(message.content, message.unsupported) if message.citations else message.content
    return link_marks(safe_markdown(text), message.id or "live", numbers)


def _step(step: ToolStep) -> Bubble:
    title = f"Tool: {plain_markdown(step.name)}"
    if step.result is None:
        return _folded(title, code_block(step.arguments), is_running=True)
    outcome = "Failed" if step.is_error else "Result"
    content = f"Asked\n{code_block(step.arguments)}\n{outcome}\n{code_block(step.result)}"
    return _folded(f"{title} failed" if step.is_error else title, content)


def _trimmed(trimmed: Trimmed) -> Bubble:
    counts = ((trimmed.num_messages, "older message"), (trimmed.num_passages, "passage"))
    parts = [f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
    reason = trimmed.reason or "The model can read only so much at once."
    return _folded(f"Left out: {' and '.join(parts) or 'some of the text'}", safe_markdown(reason))


def _no_evidence() -> Bubble:
    advice = (
        "No passage of the chosen collections is close enough to this question, so nothing was made up. "
        "Ask in other words, choose another collection, or add a document that says it."
    )
    return _folded("The documents do not say", advice)


def _unconfirmed() -> Bubble:
    advice = (
        "Passages on this subject were found and given to the model, but none of them says what this answer says. "
        "Small models do that: read it with care, ask more precisely, or choose a larger model."
    )
    return _folded("Not confirmed by your documents", advice)


def _quoted() -> Bubble:
    advice = (
        "No passage confirms the model's own words, so the sentence of your documents that says most about the "
        "question was added to them. Trust the quote; read the rest with care. Larger models need this less often."
    )
    return _folded("Only the quote is from your documents", advice)


def _folded(title: str, content: str, *, is_running: bool = False, is_open: bool = False) -> Bubble:
    metadata: dict[str, Any] = {"title": title}
    if not is_open:
        metadata["status"] = "pending" if is_running else "done"
    return {"role": "assistant", "content": content, "metadata": metadata}
