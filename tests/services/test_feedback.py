"""Feedback from the thumb to the test set: own answers only, reviewed by owners, forgotten with its documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from rag.judged_set import read_judged_set
from services.accounts import Actor
from services.api_client import ApiClient
from services.cli.commands import app
from services.conversations import Conversations
from services.feedback_test_set import write_test_set
from services.setup_errors import ConfigError
from tests.services.harness import error_of
from tests.services.knowledge_endpoint import KnowledgeEndpoint, knowledge_endpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KnowledgeEndpoint]:
    async with knowledge_endpoint(tmp_path_factory.mktemp("home")) as endpoint:
        await endpoint.service.create_collection("house", "", endpoint.owner_id)
        yield endpoint


async def answered(running: KnowledgeEndpoint, name: str, question: str, key: str | None = None) -> dict[str, str]:
    """A conversation with an answer that cites the document `name`, as a chat would have kept it."""
    accounts = running.running.accounts
    actor: Actor = accounts.authenticate(key or running.key)
    found = await running.service.search(["house"], question, 5, running.owner_id)
    chunk = next(p.chunk for p in found.passages if p.chunk.document_name == name)
    place = {"document_id": chunk.document_id, "version_id": chunk.version_id, "document": name, "page": None}
    place |= {"start": chunk.start, "end": chunk.end}
    cited = place | {"number": 1, "collection": "house", "text": chunk.text, "score": 0.9}
    other = place | {"start": chunk.start + 1, "score": 0.1}
    steps = [{"event": "retrieval", "query": question, "evidence": "found", "passages": [place, other]}]
    conversations = Conversations(running.database)
    conversation = conversations.create(actor, collections=["house"])["id"]
    asked = conversations.add_message(actor, conversation, "user", question)
    answer = conversations.add_message(
        actor, conversation, "assistant", f"It says: {chunk.text}", citations=[cited], steps=steps, model="tiny"
    )
    return {"conversation": conversation, "message": answer, "question": asked}


def given(place: dict[str, str], **other: Any) -> dict[str, Any]:
    return {"conversation": place["conversation"], "message": place["message"], "rating": "up"} | other


async def test_feedback_is_kept_with_question_passages_and_answer(running: KnowledgeEndpoint) -> None:
    document_id = await running.ingest("house", "rent.txt", "The rent is due on Monday.")
    place = await answered(running, "rent.txt", "When is the rent due?")
    made = await running.http.post("/v1/feedback", json=given(place, rating="down", reason="It is wrong"))
    assert made.status_code == 201
    entry = made.json()
    assert (entry["rating"], entry["reason"], entry["state"]) == ("down", "It is wrong", "new")
    assert entry["question"] == "When is the rent due?" and entry["answer"] == "It says: The rent is due on Monday."
    assert [(p["document_id"], p["is_cited"], p["text"]) for p in entry["passages"]] == [
        (document_id, True, "The rent is due on Monday."),
        (document_id, False, None),
    ]
    again = (await running.http.post("/v1/feedback", json=given(place))).json()
    listed = (await running.http.get("/v1/feedback")).json()["data"]
    assert [e["id"] for e in listed if e["message_id"] == place["message"]] == [again["id"]]
    assert (await running.http.delete(f"/v1/feedback/{again['id']}")).json()["deleted"] is True
    assert (await running.http.delete(f"/v1/feedback/{again['id']}")).status_code == 404


async def test_only_ones_own_answers_are_rated(running: KnowledgeEndpoint) -> None:
    await running.ingest("house", "key.txt", "The key lies under the stone.")
    place = await answered(running, "key.txt", "Where does the key lie?")
    stranger = {"authorization": f"Bearer {await running.member_key('somebody')}"}
    refused = await running.http.post("/v1/feedback", json=given(place), headers=stranger)
    assert (refused.status_code, error_of(refused)["code"]) == (404, "message_not_found")
    question = await running.http.post("/v1/feedback", json=given(place) | {"message": place["question"]})
    assert (question.status_code, error_of(question)["code"]) == (400, "not_an_answer")
    wrong = await running.http.post("/v1/feedback", json=given(place, rating="great"))
    assert wrong.status_code == 400
    made = (await running.http.post("/v1/feedback", json=given(place))).json()
    for path in (f"/v1/feedback/{made['id']}/review", f"/v1/feedback/{made['id']}"):
        method = "POST" if path.endswith("review") else "DELETE"
        body = {"decision": "accepted"} if method == "POST" else None
        assert (await running.http.request(method, path, json=body, headers=stranger)).status_code in (403, 404)
    assert (await running.http.get("/v1/feedback?all=true", headers=stranger)).status_code == 403
    assert (await running.http.get("/v1/feedback", headers=stranger)).json()["data"] == []


async def test_what_a_member_may_no_longer_read_is_hidden_from_the_own_feedback(running: KnowledgeEndpoint) -> None:
    await running.ingest("house", "safe.txt", "The code of the safe is 4711.")
    key = await running.member_key("was allowed once")
    place = await answered(running, "safe.txt", "What is the code of the safe?", key)
    headers = {"authorization": f"Bearer {key}"}
    made = await running.http.post("/v1/feedback", json=given(place), headers=headers)
    listed = await running.http.get("/v1/feedback", headers=headers)
    assert "4711" not in made.text + listed.text
    assert listed.json()["data"][0]["is_hidden"] is True
    seen_by_owner = await running.http.get("/v1/feedback?all=true")
    assert "4711" in seen_by_owner.text


async def test_accepted_feedback_becomes_a_test_set_that_eval_reads(running: KnowledgeEndpoint, tmp_path: Path) -> None:
    document_id = await running.ingest("house", "dog.txt", "The dog is called Rex.")
    place = await answered(running, "dog.txt", "What is the dog called?")
    praised = (await running.http.post("/v1/feedback", json=given(place))).json()
    blamed_place = await answered(running, "dog.txt", "Who feeds the dog?")
    blamed = (await running.http.post("/v1/feedback", json=given(blamed_place, rating="down"))).json()
    accept = {"decision": "accepted"}
    first = (await running.http.post(f"/v1/feedback/{praised['id']}/review", json=accept)).json()
    assert (first["state"], first["relevant"]) == ("accepted", [document_id])
    unclear = await running.http.post(f"/v1/feedback/{blamed['id']}/review", json=accept)
    assert (unclear.status_code, error_of(unclear)["code"]) == (409, "relevant_missing")
    unknown = await running.http.post(f"/v1/feedback/{blamed['id']}/review", json=accept | {"relevant": ["doc_x"]})
    assert unknown.status_code == 404
    cook = await running.ingest("house", "cook.txt", "The cook feeds all animals.")
    named = await running.http.post(f"/v1/feedback/{blamed['id']}/review", json=accept | {"relevant": [cook]})
    assert named.json()["relevant"] == [cook]

    written = await in_thread(running, lambda client: write_test_set(client, tmp_path / "set"))
    judged = read_judged_set(tmp_path / "set")
    assert written.num_queries == len(judged.queries) == 2 and written.num_left_out == 0
    assert {(q.text, *q.judgements) for q in judged.queries} == {
        ("What is the dog called?", document_id),
        ("Who feeds the dog?", cook),
    }
    assert {d.id for d in judged.documents} >= {document_id, cook}
    with pytest.raises(ConfigError, match="not empty"):
        await in_thread(running, lambda client: write_test_set(client, tmp_path / "set"))
    with pytest.raises(ConfigError, match="No feedback about other"):
        await in_thread(running, lambda client: write_test_set(client, tmp_path / "none", "other"))

    await running.http.post(f"/v1/feedback/{blamed['id']}/review", json={"decision": "rejected"})
    await running.service.delete_document("house", document_id, running.owner_id)
    with pytest.raises(ConfigError, match=r"can be read any more|No feedback"):
        await in_thread(running, lambda client: write_test_set(client, tmp_path / "gone"))


async def in_thread(running: KnowledgeEndpoint, work: Any) -> Any:
    def run() -> Any:
        with ApiClient(running.url, running.key) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_a_deleted_document_is_forgotten_in_feedback_too(running: KnowledgeEndpoint) -> None:
    document_id = await running.ingest("house", "gone.txt", "The treasure lies at the well.")
    place = await answered(running, "gone.txt", "Where does the treasure lie?")
    made = (await running.http.post("/v1/feedback", json=given(place))).json()
    await running.service.delete_document("house", document_id, running.owner_id)
    listed = await running.http.get("/v1/feedback?all=true")
    entry = next(e for e in listed.json()["data"] if e["id"] == made["id"])
    assert (entry["answer"], entry["passages"]) == ("", [])
    assert entry["question"] == "Where does the treasure lie?" and "at the well" not in listed.text


async def test_pages_of_feedback_follow_each_other(running: KnowledgeEndpoint) -> None:
    everything = (await running.http.get("/v1/feedback?all=true&limit=1000")).json()["data"]
    assert len(everything) >= 4
    paged: list[str] = []
    after = ""
    while True:
        page = (await running.http.get(f"/v1/feedback?all=true&limit=2{after}")).json()
        paged += [entry["id"] for entry in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={paged[-1]}"
    assert paged == [entry["id"] for entry in everything]
    for wrong in ("limit=0", "limit=x", "state=odd", "all=maybe"):
        assert (await running.http.get(f"/v1/feedback?{wrong}")).status_code == 400


async def test_the_commands_list_accept_reject_and_write_the_set(running: KnowledgeEndpoint, tmp_path: Path) -> None:
    def windfarm(*words: str) -> Any:
        there = ("--home", str(running.home), "--api", running.url, "--key", running.key)
        return CliRunner().invoke(app, [*words, *there])

    document_id = await running.ingest("house", "cat.txt", "The cat is called Mia.")
    ids = []
    for rating in ("up", "down"):
        place = await answered(running, "cat.txt", f"What is the cat called ({rating})?")
        body = given(place, rating=rating, reason="Because")
        ids.append((await running.http.post("/v1/feedback", json=body)).json()["id"])
    listed = (await asyncio.to_thread(windfarm, "feedback", "list")).output
    assert f"{ids[0]}  up: Because  (new)" in listed and f"cites:    {document_id}  cat.txt" in listed
    accepted = await asyncio.to_thread(windfarm, "feedback", "accept", ids[0])
    assert accepted.output == f"{ids[0]} is accepted, relevant: {document_id}\n"
    assert (await asyncio.to_thread(windfarm, "feedback", "reject", ids[1])).output == f"{ids[1]} is rejected\n"
    folder = tmp_path / "set"
    written = await asyncio.to_thread(windfarm, "eval", "from-feedback", str(folder), "--collection", "house")
    assert written.exit_code == 0 and "windfarm eval retrieval" in written.output
    assert [query.text for query in read_judged_set(folder).queries] == ["What is the cat called (up)?"]
