"""A small company for the leak test: people, groups, collections and documents, what everybody may read by plain rules,
and requests to the real endpoint in this process, with the real database and vector store behind it.

Vectors are hashed words (no model runs), and the model that answers repeats all that it was given: whatever reaches a
prompt comes out.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select

from cluster.engine import GenerationChunk, GenerationRequest, Usage
from services.database import Collection, StoredFile, VectorStoreFile, Version
from services.store_opening import StoreParts
from services.store_service import StoreService
from tests.services.filling import add_document
from tests.services.harness import Running
from tests.services.ingesting import HashEmbedder, word_spans

DIMENSION = 64
TOPICS = ("salary", "harbour", "engine", "recipe", "garden", "contract")
_MARK = re.compile(r"zq(\d+)zq")
"""Stands in the text, the title and the name of a document, and in no question."""
_PDF = Path(__file__).parents[1] / "data" / "documents" / "movie-theater-booking-2024.pdf"


class Embedder(HashEmbedder):
    max_tokens = 512

    def __init__(self) -> None:
        super().__init__(dimension=DIMENSION)

    async def connect(self) -> None: ...

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        return word_spans(text)


class EchoModel:
    """Calls the search tool once where there is one, and then says everything that it was told."""

    max_context = 1_000_000
    template_knows_tools = True

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        messages = [dict(message) for message in request.messages or ()]
        told = "\n".join(str(message.get("content") or "") for message in messages)
        if request.tools and not any(message["role"] == "tool" for message in messages):
            call = {"name": "knowledge_search", "arguments": {"query": str(messages[-1]["content"])[-200:], "top_k": 5}}
            told = f"<tool_call>{json.dumps(call)}</tool_call>"
        yield GenerationChunk(text=told, token_ids=(1,))
        yield GenerationChunk(finish_reason="stop", usage=Usage(1, 1))

    async def count_tokens(self, request: GenerationRequest) -> int:
        return 1


class AtOnce(ThreadPoolExecutor):
    """Runs at once what is meant for a thread: tries come one after the other, and handing each over takes longer than
    most of them."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  # it is the caller's, as from a thread
            future.set_exception(error)
        return future


class DirectCalls:
    def __init__(self, service: StoreService) -> None:
        self._service = service

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self._service, method)(*args, **kwargs)


@dataclass(frozen=True)
class Size:
    people: int
    groups: int
    boxes: int
    papers: int
    changes: int


LARGE = Size(people=16, groups=6, boxes=10, papers=90, changes=60)
SMALL = Size(people=8, groups=4, boxes=5, papers=30, changes=30)


@dataclass
class Person:
    name: str
    key: str = ""
    role: str = "member"
    tenant: str = "default"
    groups: set[str] = field(default_factory=set)
    conversation: str = ""


@dataclass
class Box:
    """A collection."""

    number: int
    owner: str
    tenant: str
    id: str = ""
    readers: set[str] = field(default_factory=set)
    """Names of people and groups, and "everybody"."""

    @property
    def name(self) -> str:
        return f"box {self.number}"


@dataclass
class Paper:
    """A document."""

    number: int
    box: int
    id: str
    topic: str
    own: set[str] | None = None

    @property
    def name(self) -> str:
        return f"zq{self.number}zq.txt"

    @property
    def is_pdf(self) -> bool:
        """Whether it has a page that can be drawn."""
        return self.number % 9 == 0

    @property
    def is_file(self) -> bool:
        """Whether it came as a file of a vector store."""
        return self.number % 2 == 0

    @property
    def file_id(self) -> str:
        return f"file-{self.number}"


def text_of(number: int, topic: str) -> str:
    return f"About {topic}: the {topic} number key{number} is kept in zq{number}zq, which few people may know."


class Company:
    """What is so, and who may read what by rules in words of their own (see `may_read`)."""

    def __init__(self, running: Running, parts: StoreParts, seed: int) -> None:
        self.running = running
        self.parts = parts
        self.random = random.Random(seed)
        self.people: dict[str, Person] = {"owner": Person("owner", running.key, "owner")}
        self.groups: dict[str, str] = {}
        self.boxes: dict[int, Box] = {}
        self.papers: dict[int, Paper] = {}
        self.gone: dict[int, Box] = {}
        """Deleted documents, by number, with the collection in which they were."""
        self.feedback: list[str] = []
        """Ids of what people said of answers."""
        self.asking = "owner"
        self.num_made = 0
        self.num_changes = 0
        self.num_drawn = 0
        """Pages that were shown as pictures."""

    # The rules

    def manages(self, person: Person, box: Box) -> bool:
        if person.role == "owner":
            return True
        if person.tenant != box.tenant:
            return False
        return person.role == "administrator" or person.name == box.owner

    def may_read(self, name: str, number: int) -> bool:
        paper, person = self.papers.get(number), self.people[name]
        if paper is None:
            return False
        box = self.boxes[paper.box]
        if self.manages(person, box):
            return True
        readers = box.readers if paper.own is None else paper.own
        return person.tenant == box.tenant and bool(readers & {person.name, "everybody", *person.groups})

    def sees(self, name: str, box: Box) -> bool:
        person = self.people[name]
        if self.manages(person, box):
            return True
        is_reader = person.tenant == box.tenant and bool(box.readers & {person.name, "everybody", *person.groups})
        return is_reader or any(self.may_read(name, paper.number) for paper in self.of(box))

    def of(self, box: Box) -> list[Paper]:
        return [paper for paper in self.papers.values() if paper.box == box.number]

    def leaks(self, name: str, told: str) -> set[int]:
        """Documents of which something was told and that this person may not read."""
        return {number for number in marks(told) if not self.may_read(name, number)}

    # Asking

    async def ask(self, name: str, method: str, path: str, body: Any = None) -> tuple[int, str]:
        status, told = await self.ask_raw(name, method, path, body)
        return status, told.decode(errors="replace")

    async def ask_raw(self, name: str, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body, straight from the endpoint's application."""
        self.asking = name
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"host": "127.0.0.1", "authorization": f"Bearer {self.people[name].key}"}
        if body is not None:
            headers["content-type"] = "application/json"
        path, _, query = path.partition("?")
        quoted = path.replace(" ", "%20")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": quoted.encode(),
            "query_string": query.encode(),
            "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        }
        inbox = [{"type": "http.request", "body": data, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if inbox:
                return inbox.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.running.app(scope, receive, send)
        told = b"".join(message.get("body", b"") for message in sent)
        status = int(sent[0]["status"])
        assert status < 500, f"{name}: {method} {path}: {status} {told[:500]!r}"
        return status, told

    async def do(self, method: str, path: str, body: Any = None) -> Any:
        """As the owner; it must work."""
        status, told = await self.ask("owner", method, path, body)
        assert status < 300, f"{method} {path}: {status} {told}"
        return json.loads(told)

    # Making and changing

    async def found(self, size: Size) -> None:
        for number in range(size.people):
            role = "administrator" if number in (3, 4) else "member"
            tenant = "other" if number % 4 == 0 else "default"
            person = Person(f"person {number}", role=role, tenant=tenant)
            user = await self.do("POST", "/v1/users", {"name": person.name, "role": role, "tenant": tenant})
            person.key = (await self.do("POST", f"/v1/users/{user['id']}/keys", {"name": "k"}))["key"]
            self.people[person.name] = person
        for number in range(size.groups):
            name, tenant = f"group {number}", "other" if number % 3 == 0 else "default"
            await self.do("POST", "/v1/groups", {"name": name, "tenant": tenant})
            self.groups[name] = tenant
        for _ in range(size.boxes):
            await self.make_box()
        for _ in range(size.papers):
            self.make_paper()
            await asyncio.sleep(0)  # nothing here waits for anything else, and replicas have to announce themselves
        for _ in range(size.changes):
            await self.change(only_rights=True)

    async def make_box(self) -> None:
        owner = self.people[self.random.choice(list(self.people))]
        self.num_made += 1
        box = Box(self.num_made, owner.name, owner.tenant)
        status, told = await self.ask(owner.name, "POST", "/v1/collections", {"name": box.name})
        assert status == 201, told
        box.id = json.loads(told)["id"]
        self.boxes[box.number] = box

    def make_paper(self) -> None:
        if not self.boxes:
            return
        self.num_made += 1
        number, box = self.num_made, self.random.choice(list(self.boxes.values()))
        topic = self.random.choice(TOPICS)
        with self.parts.database.read() as session:
            collection = session.get_one(Collection, box.id)
        name = f"zq{number}zq.txt"
        parts = self.parts
        document = add_document(
            parts.database, parts.vectors, parts.journal, collection, name, text_of(number, topic), DIMENSION
        )
        self.papers[number] = paper = Paper(number, box.number, document, topic)
        if paper.is_file:
            self._make_file(paper, collection)
        if paper.is_pdf:
            self._make_pdf(paper)

    def _make_pdf(self, paper: Paper) -> None:
        """As if its text had been read from a PDF of one page."""
        with self.parts.database.write() as session:
            version = session.scalars(select(Version).where(Version.document_id == paper.id)).one()
            version.mime_type = "application/pdf"
            version.pages = [[1, 0, version.num_characters]]
            self.parts.blobs.originals.keep(version.id, _PDF)

    def _make_file(self, paper: Paper, collection: Collection) -> None:
        """As if it had come through OpenAI's files: all of a box in one batch."""
        about = {"filename": paper.name, "purpose": "assistants", "num_bytes": 1}
        box_id, batch = collection.id, f"vsfb_{paper.box}"
        with self.parts.database.write() as session:
            session.add(StoredFile(id=paper.file_id, owner_id=collection.owner_id, **about))
            session.flush()
            session.add(
                VectorStoreFile(
                    collection_id=box_id, file_id=paper.file_id, document_name=paper.name, job_id="", batch_id=batch
                )
            )

    async def change(self, *, only_rights: bool = False) -> None:
        """Something happens: somebody joins or leaves, a right is given or taken, a document comes or goes."""
        self.num_changes += 1
        choices = [self._membership] * 5 + [self._share_box] * 3 + [self._share_paper] * 5
        if not only_rights:
            choices += [self._delete_paper] * 3 + [self._add_paper] * 4 + [self._delete_box, self._add_box]
        await self.random.choice(choices)()

    async def _membership(self) -> None:
        group = self.random.choice(list(self.groups))
        person = self.random.choice([each for each in self.people.values() if each.tenant == self.groups[group]])
        method = "DELETE" if group in person.groups else "PUT"
        await self.do(method, f"/v1/groups/{group}/members/{person.name}")
        person.groups ^= {group}

    def _some_readers(self, tenant: str) -> set[str]:
        people = [each.name for each in self.people.values() if each.tenant == tenant]
        groups = [name for name, of_tenant in self.groups.items() if of_tenant == tenant]
        chosen = self.random.sample(people, self.random.randint(0, 2)) + self.random.sample(groups, 1)
        return set(self.random.choice((chosen, chosen, chosen, ["everybody"], [])))

    def _body(self, readers: set[str]) -> dict[str, Any]:
        return {
            "users": sorted(readers & self.people.keys()),
            "groups": sorted(readers & self.groups.keys()),
            "everybody": "everybody" in readers,
        }

    async def _share_box(self) -> None:
        if self.boxes:
            box = self.random.choice(list(self.boxes.values()))
            box.readers = self._some_readers(box.tenant)
            await self.do("PUT", f"/v1/collections/{box.id}/readers", self._body(box.readers))

    async def _share_paper(self) -> None:
        if not self.papers:
            return
        paper = self.random.choice(list(self.papers.values()))
        box = self.boxes[paper.box]
        paper.own = None if self.random.random() < 0.3 else self._some_readers(box.tenant)
        body = {"inherit": True} if paper.own is None else self._body(paper.own)
        await self.do("PUT", f"/v1/collections/{box.id}/documents/{paper.id}/readers", body)

    async def _delete_paper(self) -> None:
        if not self.papers:
            return
        paper = self.papers.pop(self.random.choice(list(self.papers)))
        self.gone[paper.number] = self.boxes[paper.box]
        receipt = await self.do("DELETE", f"/v1/collections/{self.boxes[paper.box].id}/documents/{paper.id}")
        assert receipt["self_check"]["is_clean"] and receipt["num_passages"] == 1, receipt

    async def _add_paper(self) -> None:
        self.make_paper()

    async def _delete_box(self) -> None:
        if len(self.boxes) < 6:
            return
        box = self.boxes.pop(self.random.choice(list(self.boxes)))
        gone = [paper.number for paper in self.of(box)]
        self.papers = {number: paper for number, paper in self.papers.items() if number not in gone}
        self.gone |= dict.fromkeys(gone, box)
        receipt = await self.do("DELETE", f"/v1/collections/{box.id}")
        assert receipt["self_check"]["is_clean"] and receipt["num_documents"] == len(gone), receipt

    async def _add_box(self) -> None:
        await self.make_box()


def marks(told: str) -> set[int]:
    return {int(number) for number in _MARK.findall(told)}
