"""Users, groups and keys through the public endpoint, and the commands that speak to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.services.harness import Running, error_of, running_endpoint
from tests.services.test_cli import run


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_endpoint(tmp_path) as made:
        yield made


async def ask(running: Running, method: str, path: str, body: Any = None, key: str | None = None) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await running.http.request(method, path, json=body, headers=headers)


async def add(running: Running, name: str, **fields: str) -> str:
    """The key of a new user."""
    assert (await ask(running, "POST", "/v1/users", {"name": name, **fields})).status_code == 201
    return str((await ask(running, "POST", f"/v1/users/{name}/keys", {"name": "k"})).json()["key"])


async def test_a_user_is_made_joins_a_group_and_goes(running: Running) -> None:
    key = await add(running, "anna")
    assert (await ask(running, "GET", "/v1/me", key=key)).json()["name"] == "anna"
    assert (await ask(running, "POST", "/v1/groups", {"name": "hr"})).status_code == 201
    for _ in range(2):
        group = (await ask(running, "PUT", "/v1/groups/hr/members/anna")).json()
        assert [member["name"] for member in group["members"]] == ["anna"]
    assert (await ask(running, "GET", "/v1/users/anna")).json()["groups"][0]["name"] == "hr"
    assert (await ask(running, "DELETE", "/v1/groups/hr/members/anna")).json()["members"] == []
    await ask(running, "PUT", "/v1/groups/hr/members/anna")
    assert (await ask(running, "DELETE", "/v1/users/anna")).json()["deleted"] is True
    assert (await ask(running, "GET", "/v1/groups/hr")).json()["members"] == []
    assert (await ask(running, "GET", "/v1/users/anna")).status_code == 404


async def test_the_key_of_a_removed_user_opens_nothing_even_while_it_is_remembered(running: Running) -> None:
    key = await add(running, "boss", role="administrator")
    assert (await ask(running, "GET", "/v1/users", key=key)).status_code == 200
    await ask(running, "DELETE", "/v1/users/boss")
    assert (await ask(running, "GET", "/v1/users", key=key)).status_code == 401


async def test_a_role_that_was_taken_ends_at_once(running: Running) -> None:
    key = await add(running, "boss", role="administrator")
    assert (await ask(running, "GET", "/v1/groups", key=key)).status_code == 200
    await ask(running, "PATCH", "/v1/users/boss", {"role": "member"})
    assert (await ask(running, "GET", "/v1/groups", key=key)).status_code == 403


async def test_members_may_look_after_nobody(running: Running) -> None:
    key = await add(running, "anna")
    await ask(running, "POST", "/v1/groups", {"name": "hr"})
    attempts = [
        ("GET", "/v1/users", None),
        ("POST", "/v1/users", {"name": "x"}),
        ("PATCH", "/v1/users/anna", {"role": "owner"}),
        ("DELETE", "/v1/users/owner", None),
        ("POST", "/v1/users/owner/keys", {"name": "mine now"}),
        ("GET", "/v1/users/owner/keys", None),
        ("PUT", "/v1/groups/hr/members/anna", None),
        ("DELETE", "/v1/groups/hr", None),
    ]
    for method, path, body in attempts:
        answer = await ask(running, method, path, body, key)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "not_administrator"), path


async def test_an_administrator_knows_their_own_tenant_alone(running: Running) -> None:
    key = await add(running, "boss", role="administrator", tenant="acme")
    await add(running, "carl", tenant="acme")
    await add(running, "anna")
    assert [user["name"] for user in (await ask(running, "GET", "/v1/users", key=key)).json()["data"]] == [
        "boss",
        "carl",
    ]
    for method, path, body, status in (
        ("GET", "/v1/users/anna", None, 404),
        ("DELETE", "/v1/users/anna", None, 404),
        ("POST", "/v1/users/owner/keys", {"name": "x"}, 404),
        ("POST", "/v1/users", {"name": "x", "tenant": "default"}, 403),
        ("POST", "/v1/users", {"name": "x", "role": "owner"}, 403),
        ("PATCH", "/v1/users/carl", {"role": "owner"}, 403),
    ):
        assert (await ask(running, method, path, body, key)).status_code == status, path
    made = (await ask(running, "POST", "/v1/users", {"name": "dora"}, key)).json()
    assert made["tenant"] == "acme"
    await ask(running, "POST", "/v1/groups", {"name": "all"}, key)
    assert (await ask(running, "PUT", "/v1/groups/all/members/anna")).status_code == 404


async def test_an_administrator_gets_no_owners_key(running: Running) -> None:
    """Of the same tenant: the owner's key would be every right there is."""
    key = await add(running, "boss", role="administrator")
    for method, path, body in (
        ("POST", "/v1/users/owner/keys", {"name": "x"}),
        ("GET", "/v1/users/owner/keys", None),
        ("PATCH", "/v1/users/owner", {"role": "member"}),
        ("DELETE", "/v1/users/owner", None),
    ):
        assert (await ask(running, method, path, body, key)).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/users", {"name": "owner"}, 409, "user_exists"),
        ("POST", "/v1/users", {"name": "../x"}, 400, "bad_name"),
        ("POST", "/v1/users", {"name": "x", "role": "king"}, 400, None),
        ("POST", "/v1/users", {"name": "x", "tenant": "No Tenant"}, 400, None),
        ("POST", "/v1/users", {"name": "x", "groups": []}, 400, None),
        ("DELETE", "/v1/users/owner", None, 409, "last_owner"),
        ("PATCH", "/v1/users/owner", {"role": "member"}, 409, "last_owner"),
        ("DELETE", "/v1/users/nobody", None, 404, "unknown_user"),
        ("DELETE", "/v1/groups/none", None, 404, "unknown_group"),
        ("PUT", "/v1/groups/none/members/owner", None, 404, "unknown_group"),
        ("DELETE", "/v1/users/owner/keys/key_none", None, 404, "key_not_found"),
    ],
)
async def test_what_cannot_be_done_is_said(
    running: Running, method: str, path: str, body: Any, status: int, code: str | None
) -> None:
    answer = await ask(running, method, path, body)
    assert answer.status_code == status and (code is None or error_of(answer)["code"] == code), answer.text


async def test_a_user_who_owns_collections_stays(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, documents=("doc_1",)) as running:
        await ask(running, "POST", "/v1/users", {"name": "second", "role": "owner"})
        answer = await ask(running, "DELETE", "/v1/users/owner")
        assert (answer.status_code, error_of(answer)["code"]) == (409, "user_owns_collections")
        assert "towers" in error_of(answer)["message"]


async def test_a_revoked_key_of_a_user_is_listed_as_such(running: Running) -> None:
    await add(running, "anna")
    (key,) = (await ask(running, "GET", "/v1/users/anna/keys")).json()["data"]
    assert "key" not in key and key["revoked_at"] is None
    assert (await ask(running, "DELETE", f"/v1/users/anna/keys/{key['id']}")).json()["revoked"] is True
    (key,) = (await ask(running, "GET", "/v1/users/anna/keys")).json()["data"]
    assert key["revoked_at"] is not None


async def test_commands_make_users_groups_and_members(running: Running) -> None:
    async def command(*words: str) -> Any:
        done = await asyncio.to_thread(run, *words, "--api", running.url, "--key", running.key, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    anna = await command("user", "add", "anna")
    assert (await ask(running, "GET", "/v1/me", key=anna["key"])).json()["id"] == anna["id"]
    await command("group", "add", "hr")
    joined = await command("group", "join", "hr", "anna", "owner")
    assert [member["name"] for member in joined["members"]] == ["anna", "owner"]
    assert [user["name"] for user in (await command("user", "list"))["users"]] == ["anna", "owner"]


async def test_the_share_command_says_what_the_store_is_asked(running: Running) -> None:
    readers = {"object": "readers", "collection": "b", "everybody": False, "users": [], "groups": [{"name": "hr"}]}
    running.store.answers = {"share": lambda *_: readers, "readers": lambda *_: readers}

    async def share(*words: str) -> Any:
        return await asyncio.to_thread(run, "share", "b", *words, "--api", running.url, "--key", running.key)

    done = await share("--group", "hr", "--not-user", "ben")
    assert (done.returncode, done.stdout) == (0, "Collection 'b' is read by group hr.\n"), done.stderr
    (_, (name, document, change, _)) = running.store.asked[-1]
    assert (name, document, change.add.groups, change.remove.users, change.only) == ("b", None, ("hr",), ("ben",), None)
    wrong = await share("--inherit")
    assert wrong.returncode != 0 and "--document" in wrong.stderr


async def test_the_delete_command_prints_the_receipt(running: Running) -> None:
    check = {"points": 0, "rows": 0, "answers": 0, "uploads": 0, "search_hits": 0, "num_searches": 4, "is_clean": True}
    receipt = {
        "id": "doc_1",
        "object": "document.deleted",
        "name": "vault.txt",
        "receipt_id": "receipt_1",
        "num_documents": 1,
        "num_versions": 1,
        "removed": {"points": 3, "words": 40, "word_entries": 60, "jobs": 1, "uploads": 0, "answers": 2},
        "self_check": check,
    }
    running.store.answers = {"delete_document": lambda *_: receipt}
    words = ["delete", "b", "doc_1", "--api", running.url, "--key", running.key]
    done = await asyncio.to_thread(run, *words)
    assert done.returncode == 0, done.stderr
    assert "'vault.txt' is deleted: nothing is left. Receipt receipt_1." in done.stdout
    assert "3 passages, 40 words, 60 word entries" in done.stdout and "(of 4 searches for it)" in done.stdout
    assert json.loads((await asyncio.to_thread(run, *words, "--json")).stdout) == receipt
