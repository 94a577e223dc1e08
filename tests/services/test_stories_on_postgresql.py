"""Stories of endpoint and store once more, with PostgreSQL below: limits, feedback, files, sharing, receipts.

The tests are those of the modules that they stand in; fixtures of the same names put them on a server's database here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from services.api_client import ApiFailed
from services.limits import Limits
from tests.services import test_feedback, test_file_search, test_receipts, test_sharing
from tests.services.harness import ScriptedEngine, error_of, running_endpoint, words
from tests.services.ingesting import Running
from tests.services.ingesting import running as running_store
from tests.services.knowledge_endpoint import KnowledgeEndpoint, knowledge_endpoint
from tests.services.test_backup import call
from tests.services.test_endpoint_limits import chat, key_of

pytestmark = [pytest.mark.integration, pytest.mark.requires("postgres")]


@pytest.fixture
async def running(tmp_path: Path, postgres_url: str) -> AsyncIterator[KnowledgeEndpoint]:
    async with knowledge_endpoint(tmp_path, database_url=postgres_url) as endpoint:
        await endpoint.service.create_collection("house", "", endpoint.owner_id)
        yield endpoint


@pytest.fixture
def client(running: KnowledgeEndpoint) -> openai.AsyncOpenAI:
    return running.running.openai


@pytest.fixture
async def windfarm(tmp_path: Path, postgres_url: str) -> AsyncIterator[Running]:
    async with running_store(tmp_path, url=postgres_url) as made:
        made.create()
        yield made


async def test_a_limited_key_and_a_kept_conversation(tmp_path: Path, postgres_url: str) -> None:
    async with (
        running_endpoint(tmp_path, ScriptedEngine(*words("Hel", "lo")), database_url=postgres_url) as endpoint,
        key_of(endpoint, Limits(requests_per_minute=2)) as limited,
    ):
        conversation = (await limited.post("/v1/conversations", json={})).json()["id"]
        for _ in range(2):
            assert (await chat(limited, conversation=conversation)).status_code == 200
        refused = await chat(limited, conversation=conversation)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
        kept = (await limited.get(f"/v1/conversations/{conversation}")).json()["messages"]
        assert [message["content"] for message in kept] == ["Hello", "Hello"] * 2
        assert (await endpoint.chat()).status_code == 200


async def test_a_backup_is_refused_and_what_to_use_instead_is_said(running: KnowledgeEndpoint, tmp_path: Path) -> None:
    file = tmp_path / "any"
    file.write_bytes(b"whatever it holds")
    for work in (
        lambda client: client.download("/v1/backup", tmp_path / "b.backup"),
        lambda client: client.send_file("/v1/restore", file),
    ):
        with pytest.raises(ApiFailed, match=r"pg_dump.*windfarm kb export") as refused:
            await call(running, work)
        assert (refused.value.status, refused.value.code) == (409, "backup_unsupported")
    assert not (tmp_path / "b.backup").exists() and not list((running.home / "uploads").iterdir())
    assert not [path for path in running.home.iterdir() if path.name.startswith(("backup-", "restore-"))]


test_feedback_becomes_a_test_set = test_feedback.test_accepted_feedback_becomes_a_test_set_that_eval_reads
test_a_deleted_file_leaves_its_stores = test_file_search.test_a_deleted_file_leaves_all_its_stores
test_answers_lose_their_text = test_receipts.test_answers_that_could_use_a_document_lose_their_text_with_it


class TestSharing:
    @pytest.fixture
    async def windfarm(self, tmp_path: Path, postgres_url: str) -> AsyncIterator[Running]:
        async with test_sharing.people_and_handbook(tmp_path, postgres_url) as made:
            yield made

    test_memberships = staticmethod(test_sharing.test_a_membership_holds_at_once_and_ends_at_once)
