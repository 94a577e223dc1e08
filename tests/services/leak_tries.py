"""One try of each kind to read what one may not: what is asked, and what beside the marks must be right."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Awaitable, Callable
from typing import Any

from tests.services.leaking import (
    TOPICS,
    Box,
    Company,
    marks,
    text_of,
)


def some_box(firm: Company) -> Box:
    return firm.random.choice(list(firm.boxes.values()))


def some_question(firm: Company) -> str:
    topic = firm.random.choice(TOPICS)
    papers = list(firm.papers) + list(firm.gone)[-20:]
    return firm.random.choice((topic, f"Which {topic} number?", f"key{firm.random.choice(papers)} {topic}"))


def _is_hidden(firm: Company, name: str, box: Box, status: int, told: str) -> bool:
    """Whether the answer is that for a collection which does not exist: just for those who see none of it."""
    sees = firm.sees(name, box)
    assert (status == 404) == (not sees), (name, box, status, told)
    if not sees:
        assert json.loads(told)["error"]["code"] == "unknown_collection"
    return not sees


def _check_counts(firm: Company, name: str, box: Box, shown: dict[str, Any]) -> None:
    readable = [paper for paper in firm.of(box) if firm.may_read(name, paper.number)]
    assert shown["num_documents"] == shown["num_chunks"] == len(readable)
    assert shown["can_change"] == firm.manages(firm.people[name], box)


async def list_collections(firm: Company, name: str) -> str:
    _, told = await firm.ask(name, "GET", "/v1/collections")
    shown = {each["id"]: each for each in json.loads(told)["data"]}
    assert shown.keys() == {box.id for box in firm.boxes.values() if firm.sees(name, box)}
    for box in firm.boxes.values():
        if box.id in shown:
            _check_counts(firm, name, box, shown[box.id])
    return told


async def show_collection(firm: Company, name: str) -> str:
    box = some_box(firm)
    status, told = await firm.ask(name, "GET", f"/v1/collections/{firm.random.choice((box.id, box.name))}")
    if not _is_hidden(firm, name, box, status, told):
        _check_counts(firm, name, box, json.loads(told))
    return told


async def list_documents(firm: Company, name: str) -> str:
    box = some_box(firm)
    status, told = await firm.ask(name, "GET", f"/v1/collections/{box.id}/documents")
    if not _is_hidden(firm, name, box, status, told):
        assert marks(told) == {paper.number for paper in firm.of(box) if firm.may_read(name, paper.number)}
    return told


async def show_document(firm: Company, name: str) -> str:
    paper = firm.random.choice(list(firm.papers.values()))
    status, told = await firm.ask(name, "GET", f"/v1/collections/{firm.boxes[paper.box].id}/documents/{paper.id}")
    assert (status == 200) == firm.may_read(name, paper.number)
    if status != 200:
        assert (status, json.loads(told)["error"]["code"]) == (404, "unknown_document")
    return told


async def search(firm: Company, name: str) -> str:
    box, question = some_box(firm), some_question(firm)
    body = {"query": question, "top_k": firm.random.choice((1, 5, 50))}
    status, told = await firm.ask(name, "POST", f"/v1/collections/{box.id}/search", body)
    if not _is_hidden(firm, name, box, status, told) and body["top_k"] == 50:
        # What may be read is found as well: rights take away nothing else.
        assert marks(told) >= {paper.number for paper in firm.of(box) if firm.may_read(name, paper.number)}
    return told


async def _chat(firm: Company, name: str, **fields: Any) -> str:
    seen = [box.id for box in firm.boxes.values() if firm.sees(name, box)]
    asked = firm.random.sample(seen, min(len(seen), 2)) or [some_box(firm).id]
    if firm.random.random() < 0.1:
        asked.append(some_box(firm).id)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": some_question(firm)}],
        "knowledge": {"collections": asked},
    }
    status, told = await firm.ask(name, "POST", "/v1/chat/completions", body | fields)
    boxes = [box for box in firm.boxes.values() if box.id in asked]
    assert (status == 404) == (not all(firm.sees(name, box) for box in boxes)), told
    return told


async def chat(firm: Company, name: str) -> str:
    return await _chat(firm, name)


async def chat_streamed(firm: Company, name: str) -> str:
    return await _chat(firm, name, stream=True)


async def chat_with_search_tool(firm: Company, name: str) -> str:
    return await _chat(firm, name, windfarm_tools=["knowledge_search"], tool_choice="auto")


async def chat_that_is_kept(firm: Company, name: str) -> str:
    person = firm.people[name]
    if not person.conversation or firm.random.random() < 0.2:
        _, made = await firm.ask(name, "POST", "/v1/conversations", {})
        person.conversation = json.loads(made)["id"]
    return await _chat(firm, name, conversation=person.conversation)


async def show_conversation(firm: Company, name: str) -> str:
    """One's own: of what was said, only what may be read now. Another's does not exist."""
    kept = [person for person in firm.people.values() if person.conversation]
    if not kept:
        return ""
    whose = firm.people[name] if firm.people[name].conversation else firm.random.choice(kept)
    if firm.random.random() < 0.2:
        whose = firm.random.choice(kept)
    status, told = await firm.ask(name, "GET", f"/v1/conversations/{whose.conversation}")
    assert (status == 200) == (whose.name == name)
    return told


async def list_conversations(firm: Company, name: str) -> str:
    return (await firm.ask(name, "GET", "/v1/conversations"))[1]


async def list_jobs(firm: Company, name: str) -> str:
    box = some_box(firm)
    if firm.random.random() < 0.3:
        return (await firm.ask(name, "GET", "/v1/jobs"))[1]
    status, told = await firm.ask(name, "GET", f"/v1/collections/{box.id}/jobs")
    if not _is_hidden(firm, name, box, status, told) and not firm.manages(firm.people[name], box):
        assert json.loads(told)["data"] == []
    return told


async def show_readers(firm: Company, name: str) -> str:
    box = some_box(firm)
    status, told = await firm.ask(name, "GET", f"/v1/collections/{box.id}/readers")
    if not _is_hidden(firm, name, box, status, told):
        assert status == (200 if firm.manages(firm.people[name], box) else 403)
    return told


async def list_receipts(firm: Company, name: str) -> str:
    """They name what is gone, to those who managed it, and hold no text."""
    _, told = await firm.ask(name, "GET", "/v1/receipts")
    assert "About" not in told
    assert all(firm.manages(firm.people[name], firm.gone[number]) for number in marks(told))
    return ""


async def forbidden_changes(firm: Company, name: str) -> str:
    """Whoever may not see a collection learns nothing by trying to change it."""
    box = some_box(firm)
    if firm.manages(firm.people[name], box):
        return ""
    paper = firm.random.choice(list(firm.papers.values()))
    attempts = [
        ("DELETE", f"/v1/collections/{box.id}", None),
        ("POST", f"/v1/collections/{box.id}/reembed", None),
        ("DELETE", f"/v1/collections/{box.id}/tune", None),
        ("POST", f"/v1/vector_stores/{box.id}", {"name": "mine"}),
        ("POST", f"/v1/collections/{box.id}/jobs/cancel", None),
        ("PUT", f"/v1/collections/{box.id}/readers", {"everybody": True}),
        ("DELETE", f"/v1/collections/{box.id}/documents/{paper.id}", None),
        ("PUT", f"/v1/collections/{box.id}/documents/{paper.id}/readers", {"inherit": True}),
    ]
    status, told = await firm.ask(name, *firm.random.choice(attempts))
    assert status in ((403, 404) if firm.sees(name, box) else (404,)), told
    return told


async def view_document(firm: Company, name: str) -> str:
    drawn = [paper for paper in firm.papers.values() if paper.is_pdf]
    paper = firm.random.choice(drawn if drawn and firm.random.random() < 0.5 else list(firm.papers.values()))
    pictures, texts = ("view?image=true&width=200", "pages/1?width=200"), ("view", "view", "pages/1")
    way = firm.random.choice(pictures if paper.is_pdf else texts)
    path = f"/v1/collections/{firm.boxes[paper.box].id}/documents/{paper.id}/{way}"
    status, told = await firm.ask(name, "GET", path)
    if not firm.may_read(name, paper.number):
        assert (status, json.loads(told)["error"]["code"]) == (404, "unknown_document"), told
    elif paper.is_pdf or way.startswith("view"):
        assert status == 200, told
        firm.num_drawn += "PNG" in told[:8] or "png_base64" in told
    else:
        assert (status, json.loads(told)["error"]["code"]) == (404, "no_such_page")
    return told


async def list_vector_stores(firm: Company, name: str) -> str:
    _, told = await firm.ask(name, "GET", "/v1/vector_stores")
    shown = {each["id"]: each for each in json.loads(told)["data"]}
    seen = [box for box in firm.boxes.values() if firm.sees(name, box)]
    assert shown.keys() == {box.id for box in seen}
    for box in seen:
        readable = [paper for paper in firm.of(box) if firm.may_read(name, paper.number)]
        assert shown[box.id]["file_counts"]["total"] == len(readable)
        assert shown[box.id]["usage_bytes"] == sum(len(text_of(each.number, each.topic)) for each in readable)
    return told


async def look_into_vector_store(firm: Company, name: str) -> str:
    box = some_box(firm)
    method, path, body = firm.random.choice(
        [
            ("GET", "", None),
            ("GET", "/files", None),
            ("POST", "/search", {"query": some_question(firm), "max_num_results": 50}),
            ("POST", "/search", {"query": some_question(firm), "max_num_results": 5}),
        ]
    )
    status, told = await firm.ask(name, method, f"/v1/vector_stores/{box.id}{path}", body)
    assert (status == 404) == (not firm.sees(name, box)), told
    return told


async def look_at_file_of_vector_store(firm: Company, name: str) -> str:
    papers = [paper for paper in firm.papers.values() if paper.is_file]
    if not papers:
        return ""
    paper = firm.random.choice(papers)
    box, batch = firm.boxes[paper.box], f"file_batches/vsfb_{paper.box}"
    together = {each.number for each in papers if each.box == paper.box and firm.may_read(name, each.number)}
    path, shown = firm.random.choice(
        [
            (f"files/{paper.file_id}", {paper.number} & together),
            (f"files/{paper.file_id}/content", {paper.number} & together),
            (batch, together),
            (f"{batch}/files?limit=100", together),
        ]
    )
    status, told = await firm.ask(name, "GET", f"/v1/vector_stores/{box.id}/{path}")
    assert (status == 200) == bool(shown), (status, told)
    if status == 200 and path == batch:
        assert json.loads(told)["file_counts"]["total"] == len(together)
    return told


async def ask_over_mcp(firm: Company, name: str) -> str:
    paper = firm.random.choice(list(firm.papers.values()))
    tool, arguments = firm.random.choice(
        [
            ("search", {"query": some_question(firm), "limit": 20}),
            ("search", {"query": some_question(firm), "collections": [firm.boxes[paper.box].id]}),
            ("read", {"document_id": paper.id}),
            ("list_collections", {}),
        ]
    )
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    _, told = await firm.ask(name, "POST", "/mcp", call)
    if tool == "read":
        assert (paper.number in marks(told)) == firm.may_read(name, paper.number)
    return told


async def carry_files_away(firm: Company, name: str) -> str:
    """An export is for those who manage the whole collection, a backup for the owner of the installation."""
    person, box = firm.people[name], some_box(firm)
    if firm.random.random() < 0.3 and person.role != "owner":
        for method, path in (("GET", "/v1/backup"), ("POST", "/v1/restore"), ("POST", "/v1/kb/import")):
            status, told = await firm.ask(name, method, path)
            assert status in (400, 403), told
        return told
    managed = [each for each in firm.boxes.values() if firm.manages(person, each)]
    exported, asked = ([box], f"?collections={box.id}") if firm.random.random() < 0.7 else (managed, "")
    status, data = await firm.ask_raw(name, "GET", f"/v1/kb/export{asked}")
    if exported and all(each in managed for each in exported):
        assert status == 200
        told = _unpacked(data)
        assert marks(told) == {paper.number for each in exported for paper in firm.of(each)}
        return told
    assert status == (400 if not exported else 403 if firm.sees(name, box) else 404)
    return data.decode()


def _unpacked(archive: bytes) -> str:
    """Names and contents of all that is in it."""
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        return "\n".join(f"{name}\n{packed.read(name).decode(errors='replace')}" for name in packed.namelist())


async def give_or_read_feedback(firm: Company, name: str) -> str:
    person = firm.people[name]
    if person.conversation and firm.random.random() < 0.5:
        _, told = await firm.ask(name, "GET", f"/v1/conversations/{person.conversation}")
        answers = [each["id"] for each in json.loads(told)["messages"] if each["role"] == "assistant"]
        if answers:
            body = {"conversation": person.conversation, "message": firm.random.choice(answers), "rating": "up"}
            status, told = await firm.ask(name, "POST", "/v1/feedback", body)
            assert status < 300, told
            firm.feedback.append(json.loads(told)["id"])
            return told
    return (await firm.ask(name, "GET", "/v1/feedback"))[1]


async def review_feedback(firm: Company, name: str) -> str:
    """Of anybody's, by whoever tries it: for the owner of the installation alone."""
    if not firm.feedback:
        return ""
    paper = firm.random.choice(list(firm.papers.values()))
    body = {"decision": firm.random.choice(("accepted", "rejected")), "relevant": [paper.id]}
    path = f"/v1/feedback/{firm.random.choice(firm.feedback)}/review"
    status, told = await firm.ask(name, "POST", path, body)
    is_owner = firm.people[name].role == "owner"
    # What was given anew for the same answer has another id.
    assert status in ((200, 404) if is_owner else (403,)), told
    assert is_owner or not marks(told)
    return told


Try = Callable[[Company, str], Awaitable[str]]
TRIES: dict[Try, tuple[int, tuple[str, ...]]] = {
    list_collections: (4, ("GET /v1/collections",)),
    show_collection: (6, ("GET /v1/collections/{name}",)),
    list_documents: (9, ("GET /v1/collections/{name}/documents",)),
    show_document: (16, ("GET /v1/collections/{name}/documents/{id}",)),
    search: (15, ("POST /v1/collections/{name}/search",)),
    chat: (1, ("POST /v1/chat/completions",)),
    chat_streamed: (1, ("POST /v1/chat/completions",)),
    chat_with_search_tool: (1, ("POST /v1/chat/completions",)),
    chat_that_is_kept: (1, ("POST /v1/chat/completions",)),
    show_conversation: (10, ("GET /v1/conversations/{id}",)),
    list_conversations: (2, ("GET /v1/conversations",)),
    list_jobs: (5, ("GET /v1/jobs", "GET /v1/collections/{name}/jobs", "GET /v1/jobs/{id}")),
    show_readers: (
        4,
        ("GET /v1/collections/{name}/readers", "GET /v1/collections/{name}/documents/{id}/readers"),
    ),
    list_receipts: (1, ("GET /v1/receipts", "GET /v1/receipts/{id}")),
    view_document: (
        8,
        ("GET /v1/collections/{name}/documents/{id}/view", "GET /v1/collections/{name}/documents/{id}/pages/{page}"),
    ),
    list_vector_stores: (1, ("GET /v1/vector_stores",)),
    look_into_vector_store: (
        6,
        ("GET /v1/vector_stores/{id}", "GET /v1/vector_stores/{id}/files", "POST /v1/vector_stores/{id}/search"),
    ),
    look_at_file_of_vector_store: (
        16,
        (
            "GET /v1/vector_stores/{id}/files/{file_id}",
            "GET /v1/vector_stores/{id}/files/{file_id}/content",
            "GET /v1/vector_stores/{id}/file_batches/{batch_id}",
            "GET /v1/vector_stores/{id}/file_batches/{batch_id}/files",
        ),
    ),
    ask_over_mcp: (5, ("POST /mcp",)),
    carry_files_away: (
        2,
        ("GET /v1/kb/export", "GET /v1/backup", "POST /v1/restore", "POST /v1/kb/import"),
    ),
    give_or_read_feedback: (3, ("GET /v1/feedback", "POST /v1/feedback")),
    review_feedback: (2, ("POST /v1/feedback/{id}/review",)),
    forbidden_changes: (3, ("DELETE /v1/collections/{name}",)),
}
"""Kind of try -> how often of a hundred, and the routes that it asks."""

SHOW_TEXT = {
    view_document,
    carry_files_away,
    look_into_vector_store,
    look_at_file_of_vector_store,
    ask_over_mcp,
    give_or_read_feedback,
    show_document,
    list_documents,
    search,
    chat,
    chat_streamed,
    chat_with_search_tool,
    chat_that_is_kept,
    show_conversation,
}

NO_TEXT_OF_DOCUMENTS = {
    "GET /health", "GET /ready", "GET /metrics", "GET /v1/status", "GET /v1/me", "GET /v1/models",
    "GET /v1/models/{id}", "GET /v1/cluster/experts", "POST /v1/completions", "POST /v1/embeddings",
    "GET /v1/users", "POST /v1/users", "GET /v1/users/{user}", "PATCH /v1/users/{user}", "DELETE /v1/users/{user}",
    "GET /v1/users/{user}/keys", "POST /v1/users/{user}/keys", "DELETE /v1/users/{user}/keys/{key}",
    "GET /v1/groups", "POST /v1/groups", "GET /v1/groups/{group}", "DELETE /v1/groups/{group}",
    "PUT /v1/groups/{group}/members/{user}", "DELETE /v1/groups/{group}/members/{user}",
    # A client's own uploads, of which its own documents are made.
    "GET /v1/files", "POST /v1/files", "GET /v1/files/{id}", "DELETE /v1/files/{id}", "GET /v1/files/{id}/content",
    # Changes: they tell of what their caller may manage or wrote.
    "POST /v1/collections", "POST /v1/collections/{name}/documents", "POST /v1/collections/{name}/reembed",
    "DELETE /v1/collections/{name}/documents/{id}",
    "PUT /v1/collections/{name}/readers", "PATCH /v1/collections/{name}/readers",
    "PUT /v1/collections/{name}/documents/{id}/readers", "PATCH /v1/collections/{name}/documents/{id}/readers",
    "POST /v1/conversations", "PATCH /v1/conversations/{id}", "DELETE /v1/conversations/{id}",
    "DELETE /v1/conversations/{id}/messages/{message_id}",
    "POST /v1/collections/{name}/urls",
    "POST /v1/jobs/{id}/pause", "POST /v1/jobs/{id}/resume", "POST /v1/jobs/{id}/cancel",
    "POST /v1/collections/{name}/jobs/pause", "POST /v1/collections/{name}/jobs/resume",
    "POST /v1/collections/{name}/jobs/cancel",
    "POST /v1/collections/{name}/tune", "DELETE /v1/collections/{name}/tune",
    "POST /v1/vector_stores", "POST /v1/vector_stores/{id}", "DELETE /v1/vector_stores/{id}",
    "DELETE /v1/feedback/{id}",
    # Of files that were added as such, by who manages the collection: tested beside their routes.
    "POST /v1/vector_stores/{id}/files", "POST /v1/vector_stores/{id}/files/{file_id}",
    "DELETE /v1/vector_stores/{id}/files/{file_id}", "POST /v1/vector_stores/{id}/file_batches",
}  # fmt: skip
"""A new route belongs here only if no text, name or count of a document can be in its answer; else it needs a try."""
