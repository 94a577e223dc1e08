"""From the API's JSON to the page's records. Used by the client alone.

Fields that are missing become empty: an older or newer server must not break the page.
"""

from __future__ import annotations

import json
from typing import Any

from ui.records import (
    ChatEvent,
    Citation,
    Cited,
    Collection,
    ContextTrimmed,
    Conversation,
    Document,
    DocumentView,
    Job,
    Message,
    PageImage,
    Retrieved,
    ToolAnswered,
    ToolCalled,
    ToolStep,
    Trimmed,
)

Json = dict[str, Any]


def windfarm_events(extension: Json) -> list[ChatEvent]:
    match extension.get("event"):
        case "retrieval":
            passages = extension.get("passages")
            found = len(passages) if isinstance(passages, list) else int(extension.get("num_passages") or 0)
            return [Retrieved(found, _rewritten(extension))]
        case "tool_call":
            name, arguments = _call_of(extension)
            return [ToolCalled(str(extension.get("id") or ""), name, arguments)]
        case "tool_result":
            name, _ = _call_of(extension)
            return [ToolAnswered(str(extension.get("id") or ""), name, _result_of(extension), _failed(extension))]
        case "citations":
            citations = tuple(_citation(entry) for entry in extension.get("citations") or ())
            places = _places(extension)
            return [Cited(citations, extension.get("answer"), extension.get("evidence"), places)]
        case "context":
            return [ContextTrimmed(_trimmed(extension))]
    return []  # an event of a newer server: what the page does not know, it does not show


def listed(body: Json, name: str) -> list[Json]:
    entries: list[Any] = body.get("data") or body.get(name) or []
    return [entry for entry in entries if isinstance(entry, dict)]


def collection(entry: Json) -> Collection:
    return Collection(
        name=str(entry["name"]),
        description=str(entry.get("description") or ""),
        num_documents=_count(entry, "num_documents"),
        refusals=_refusals(entry.get("tuning")),
    )


def _refusals(tuning: Any) -> str:
    errors = tuning.get("errors") if isinstance(tuning, dict) else None
    if not isinstance(errors, dict):
        return ""
    kinds = (
        ("wrong_refusals", "refuses {} of questions that it answers"),
        ("wrong_answers_far", "answers {} of questions on other topics"),
        ("wrong_answers_near", "answers {} of questions whose document is missing"),
    )
    said = [text.format(f"{100 * errors[name]:.0f} %") for name, text in kinds if errors.get(name) is not None]
    return f"Measured on {tuning.get('num_judged')} questions: {', '.join(said)}." if said else ""


def document(entry: Json) -> Document:
    return Document(
        id=str(entry.get("id") or entry.get("document_id") or ""),
        name=str(entry.get("name") or entry.get("filename") or "document"),
        num_chunks=_count(entry, "num_chunks"),
        text=str(entry.get("text") or ""),
    )


def document_view(entry: Json) -> DocumentView:
    text, image = entry.get("text") or {}, entry.get("image")
    return DocumentView(
        name=str(entry.get("name") or "document"),
        is_current=bool(entry.get("is_current")),
        page=int(entry["page"]) if entry.get("page") is not None else None,
        num_pages=_count(entry, "num_pages") or 0,
        before=str(text.get("before") or ""),
        marked=str(text.get("marked") or ""),
        after=str(text.get("after") or ""),
        is_beginning=bool(text.get("is_beginning")),
        is_end=bool(text.get("is_end")),
        image=_page_image(image) if isinstance(image, dict) else None,
    )


def _page_image(entry: Json) -> PageImage:
    height, boxes = int(entry["height"]), entry.get("boxes") or []
    first = min((float(box[1]) for box in boxes), default=None)
    return PageImage(
        png_base64=str(entry["png_base64"]),
        width=int(entry["width"]),
        height=height,
        first_mark=None if first is None else max(0.0, min(1.0, first / max(1, height))),
    )


def job(entry: Json) -> Job:
    error = entry.get("error")
    return Job(
        id=str(entry["id"]),
        filename=str(entry.get("filename") or ""),
        state=str(entry["state"]),
        progress=float(entry.get("progress") or 0.0),
        num_chunks=_count(entry, "num_chunks"),
        is_unchanged=bool(entry.get("unchanged")),
        error=str(error.get("message") or error.get("code")) if isinstance(error, dict) else None,
        warnings=tuple(str(warning) for warning in entry.get("warnings") or ()),
    )


def conversation(entry: Json) -> Conversation:
    return Conversation(
        id=str(entry["id"]),
        title=str(entry.get("title") or "Untitled"),
        model=entry.get("model"),
        collections=tuple(str(name) for name in entry.get("collections") or ()),
        messages=tuple(_message(message) for message in entry.get("messages") or ()),
    )


def _message(entry: Json) -> Message:
    steps = [step for step in entry.get("steps") or () if isinstance(step, dict)]
    trimmed = [_trimmed(step) for step in steps if step.get("event") == "context"]
    evidence = [step for step in steps if step.get("evidence")]
    queries = [_rewritten(step) for step in steps if step.get("event") == "retrieval"]
    return Message(
        role=str(entry.get("role") or "assistant"),
        content=str(entry.get("content") or ""),
        id=str(entry.get("id") or ""),
        citations=tuple(_citation(citation) for citation in entry.get("citations") or ()),
        steps=_tool_steps(steps),
        trimmed=trimmed[-1] if trimmed else None,
        evidence=entry.get("evidence") or (evidence[-1].get("evidence") if evidence else None),
        unsupported=_places(evidence[-1]) if evidence else (),
        query=queries[-1] if queries else "",
        state=str(entry.get("state") or "complete"),
    )


def _tool_steps(steps: list[Json]) -> tuple[ToolStep, ...]:
    """Pairs the calls with their results, in the order of the calls."""
    results = {str(step.get("id") or ""): step for step in steps if step.get("event") == "tool_result"}
    paired = []
    for step in steps:
        if step.get("event") != "tool_call":
            continue
        name, arguments = _call_of(step)
        result = results.get(str(step.get("id") or ""))
        if result is None:
            paired.append(ToolStep(name, arguments))
        else:
            paired.append(ToolStep(name, arguments, _result_of(result), _failed(result)))
    return tuple(paired)


def _citation(entry: Json) -> Citation:
    page, score = entry.get("page"), entry.get("score")
    return Citation(
        number=int(entry["number"]),
        document_id=str(entry.get("document_id") or ""),
        document=str(entry.get("document") or "document"),
        collection=str(entry.get("collection") or ""),
        page=int(page) if page is not None else None,
        start=int(entry.get("start") or 0),
        end=int(entry.get("end") or 0),
        text=str(entry.get("text") or ""),
        score=float(score) if score is not None else None,
        version_id=str(entry.get("version_id") or ""),
    )


def _places(entry: Json) -> tuple[tuple[int, int], ...]:
    return tuple((int(start), int(end)) for start, end in entry.get("unsupported") or ())


def _rewritten(event: Json) -> str:
    """What was searched for, where the server made it from several turns."""
    return str(event.get("query") or "") if event.get("rewritten") else ""


def _call_of(event: Json) -> tuple[str, str]:
    arguments = event.get("arguments")
    readable = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return str(event.get("name") or "tool"), readable


def _result_of(event: Json) -> str:
    result = event.get("content", event.get("result", event.get("error", "")))
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, indent=2)


def _failed(event: Json) -> bool:
    return bool(event.get("is_error") or event.get("error"))


def _trimmed(event: Json) -> Trimmed:
    omitted = event.get("omitted") or {}
    return Trimmed(
        num_messages=int(omitted.get("messages") or 0),
        num_passages=int(omitted.get("passages") or 0),
        reason=str(event.get("reason") or ""),
    )


def _count(entry: Json, name: str) -> int | None:
    return int(entry[name]) if entry.get(name) is not None else None
