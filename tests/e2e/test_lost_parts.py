"""Processes of the running product are killed one by one: what clients see is what the failure contract says."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.chaos.faults import Outcome
from tests.chaos.product_faults import faults
from tests.product import Product

pytestmark = pytest.mark.e2e

READY_S = 90


async def try_fault(product: Product, row: str) -> Outcome:
    (fault,) = (fault for fault in faults(product) if fault.row == row)
    outcome = await fault.try_once(is_timed=False)
    await until_ready(product)
    return outcome


async def until_ready(product: Product) -> None:
    """The tests that follow find the product as this one found it; the endpoint's own word is some seconds old."""
    body = {"model": "tiny", "prompt": "One", "max_tokens": 1}
    async with (
        asyncio.timeout(READY_S),
        httpx.AsyncClient(headers=product.headers, timeout=READY_S, trust_env=False) as http,
    ):
        while True:
            try:
                is_ready = (await http.get(f"{product.address}/ready")).status_code == 200
                if is_ready and (await http.post(f"{product.api}/completions", json=body)).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)


async def test_a_stream_of_a_killed_model_process_goes_on_in_the_next_one(product: Product) -> None:
    assert (await try_fault(product, "replica process of the product killed")).problem is None


async def test_streams_of_a_killed_relay_are_cut_and_the_next_one_answers(product: Product) -> None:
    assert (await try_fault(product, "relay")).problem is None


async def test_a_killed_embedding_process_comes_back(product: Product) -> None:
    assert (await try_fault(product, "embedding process of the product killed")).problem is None
