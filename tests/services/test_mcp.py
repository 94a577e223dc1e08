"""The MCP server with the official client, on the real store in this process; and by hand what a client never sends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from tests.services.knowledge_endpoint import KnowledgeEndpoint, knowledge_endpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KnowledgeEndpoint]:
    async with knowledge_endpoint(tmp_path_factory.mktemp("home")) as endpoint:
        await endpoint.service.create_collection("house", "Rules of the house", endpoint.owner_id)
        await endpoint.ingest("house", "rent.md", "# Rent\n\nThe rent is due on Monday.")
        yield endpoint


@asynccontextmanager
async def session(running: KnowledgeEndpoint, key: str | None = None) -> AsyncIterator[Any]:
    """The official client, connected as its users connect it."""
    mcp_client = pytest.importorskip("mcp.client.client", reason="the mcp package comes with the profiles with vLLM")
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    http = create_mcp_http_client(headers={"authorization": f"Bearer {key or running.key}"})
    async with (
        http,
        mcp_client.Client(streamable_http_client(f"{running.url}/mcp", http_client=http)) as connected,
    ):
        yield connected


async def test_the_official_client_finds_and_reads(running: KnowledgeEndpoint) -> None:
    async with session(running) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search", "read", "list_collections"}
        assert tools["search"].input_schema["required"] == ["query"]
        listed = await client.call_tool("list_collections", {})
        assert listed.structured_content["collections"] == [
            {"name": "house", "description": "Rules of the house", "num_documents": 1}
        ]
        found = await client.call_tool("search", {"query": "When is the rent due?"})
        best = found.structured_content["passages"][0]
        assert (best["document"], best["collection"], best["headings"]) == ("rent.md", "house", ["Rent"])
        assert json.loads(found.content[0].text) == found.structured_content
        named = await client.call_tool("search", {"query": "rent", "collections": ["house"], "limit": 1})
        assert len(named.structured_content["passages"]) == 1
        read = await client.call_tool("read", {"document_id": best["document_id"], "start": best["start"]})
        assert read.structured_content["text"].startswith(best["text"])
        part = await client.call_tool("read", {"document_id": best["document_id"], "start": 2, "length": 4})
        assert (part.structured_content["text"], part.structured_content["end"]) == ("Rent", 6)


async def test_what_a_model_gets_wrong_is_told_to_it(running: KnowledgeEndpoint) -> None:
    async with session(running) as client:
        for name, arguments, said in (
            ("search", {"query": "x", "collections": ["hose"]}, "Did you mean 'house'"),
            ("search", {}, "'query' is missing"),
            ("search", {"query": "x", "top_k": 3}, "'top_k' is not a known field"),
            ("read", {"document_id": "doc_none"}, "no document"),
            ("read", {"document_id": "x", "start": -1}, "'start' is wrong"),
        ):
            result = await client.call_tool(name, arguments)
            assert result.is_error and said in result.content[0].text, result


async def test_another_user_finds_and_reads_nothing(running: KnowledgeEndpoint) -> None:
    document_id = (await running.service.list_documents("house", running.owner_id))[0]["id"]
    async with session(running, await running.member_key("mcp stranger")) as client:
        assert (await client.call_tool("list_collections", {})).structured_content == {"collections": []}
        assert (await client.call_tool("search", {"query": "rent"})).structured_content == {"passages": []}
        for name, arguments in (
            ("search", {"query": "rent", "collections": ["house"]}),
            ("read", {"document_id": document_id}),
        ):
            refused = await client.call_tool(name, arguments)
            assert refused.is_error and "Monday" not in refused.content[0].text


def rpc(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


async def test_the_handshake_agrees_on_a_version(running: KnowledgeEndpoint) -> None:
    for asked, agreed in (("2025-06-18", "2025-06-18"), ("2025-11-25", "2025-11-25"), ("1999-01-01", "2025-11-25")):
        body = rpc("initialize", protocolVersion=asked, capabilities={}, clientInfo={"name": "t", "version": "1"})
        answer = await running.http.post("/mcp", json=body)
        result = answer.json()["result"]
        assert result["protocolVersion"] == agreed and result["serverInfo"]["name"] == "windfarm"
        assert "mcp-session-id" not in answer.headers
    done = await running.http.post("/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (done.status_code, done.content) == (202, b"")
    assert (await running.http.post("/mcp", json=rpc("ping"))).json()["result"] == {}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": ""}, 401),
        ({"authorization": "Bearer wf-wrong"}, 401),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 421),
        ({"mcp-protocol-version": "2024-11-05"}, 400),
        ({"content-type": "text/plain"}, 415),
    ],
)
async def test_foreign_hosts_origins_keys_and_versions_are_refused(
    running: KnowledgeEndpoint, headers: dict[str, str], status: int
) -> None:
    body = json.dumps(rpc("tools/call", name="search", arguments={"query": "rent"}))
    sent = {"content-type": "application/json"} | headers
    answer = await running.http.post("/mcp", content=body, headers=sent)
    assert answer.status_code == status and "Monday" not in answer.text


async def test_the_endpoints_own_page_may_call(running: KnowledgeEndpoint) -> None:
    answer = await running.http.post("/mcp", json=rpc("ping"), headers={"origin": running.url})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{", -32700),
        ("[" * 10_000, -32700),
        ("[]", -32600),
        ('{"method": "ping", "id": 1}', -32600),
        ('{"jsonrpc": "2.0", "method": "ping", "id": null}', -32600),
        ('{"jsonrpc": "2.0", "method": "ping", "id": {}}', -32600),
        ('{"jsonrpc": "2.0", "method": "ping", "id": 1, "params": []}', -32602),
        ('{"jsonrpc": "2.0", "method": "resources/list", "id": 1}', -32601),
        ('{"jsonrpc": "2.0", "method": "tools/call", "id": 1, "params": {"name": "delete"}}', -32602),
        ('{"jsonrpc": "2.0", "method": "tools/call", "id": 1, "params": {"name": "read", "arguments": 3}}', -32602),
    ],
)
async def test_broken_messages_get_the_codes_of_json_rpc(running: KnowledgeEndpoint, body: str, code: int) -> None:
    answer = await running.http.post("/mcp", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200 and answer.json()["error"]["code"] == code


async def test_nothing_streams_from_here(running: KnowledgeEndpoint) -> None:
    assert (await running.http.get("/mcp")).status_code == 405
    assert (await running.http.delete("/mcp")).status_code == 405
