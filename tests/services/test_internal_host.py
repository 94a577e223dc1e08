"""Where the environment names an address of the node, internal ports listen there and announce it; the secret stays."""

from pathlib import Path

import aiohttp
import pytest

from rag.errors import StoreError
from services.config import Environment, StoreConfig
from services.discovery import decode_beat
from services.listener import start_listener
from services.model_service import ModelService
from services.page import demand_secret
from services.store_opening import open_store
from tests.services.harness import ScriptedEngine

ADDRESS = "127.0.0.2"
"""Another address of this machine, as a node of a cluster has one beside loopback."""


class Beats(dict[str, bytes]):
    def put(self, key: str, value: bytes) -> None:
        self[key] = value

    def delete(self, key: str) -> None:
        self.pop(key, None)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        return dict(self)


async def test_a_model_replica_listens_on_the_nodes_address_alone_and_announces_it() -> None:
    beats = Beats()
    service = ModelService(ScriptedEngine(), "secret", app="llm-tiny", replica_id="r1", beats=beats, host=ADDRESS)
    await service.start()
    try:
        announced = decode_beat(beats["windfarm/llm-tiny/r1"]).url
        assert announced.startswith(f"http://{ADDRESS}:")
        async with aiohttp.ClientSession() as session:
            assert (await session.get(f"{announced}/health")).status == 401
            known = {"x-windfarm-internal": "secret"}
            assert (await session.get(f"{announced}/health", headers=known)).status == 200
            with pytest.raises(aiohttp.ClientConnectionError):
                await session.get(announced.replace(ADDRESS, "127.0.0.1"))
    finally:
        await service.stop(drain_s=0)


async def test_the_page_on_the_nodes_address_wants_the_secret() -> None:
    async def page(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    listener = await start_listener(demand_secret(page, "secret"), ADDRESS)
    try:
        async with aiohttp.ClientSession() as session:
            assert (await session.get(listener.url)).status == 403
            assert (await session.get(listener.url, headers={"x-windfarm-internal": "secret"})).status == 200
    finally:
        await listener.stop()


def test_the_environments_vector_server_is_used_and_named_where_it_does_not_answer(tmp_path: Path) -> None:
    environment = Environment(
        home=tmp_path,
        database_url=f"sqlite:///{tmp_path / 'windfarm.db'}",
        internal_secret="secret",
        qdrant_url="http://127.0.0.1:9",
    )
    with pytest.raises(StoreError, match=r"Qdrant server does not answer .* Connection refused"):
        open_store(StoreConfig(), environment)
    assert not (tmp_path / "qdrant").exists()
