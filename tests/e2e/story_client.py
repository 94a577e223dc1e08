"""Asks a running product for stories, as streams whose progress and whose end can be seen."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx

from tests.e2e.mixture import FORBIDDEN
from tests.product import Product

ANSWER = 300
ENDLESS = {str(token): -100 for token in FORBIDDEN}
WAIT_S = 240


class Client:
    """Streams against the product, with what came of each. An async context manager."""

    def __init__(self, product: Product) -> None:
        self._address = product.address
        limits = httpx.Limits(max_connections=64)
        self._http = httpx.AsyncClient(
            base_url=product.api, headers=product.headers, timeout=WAIT_S, limits=limits, trust_env=False
        )
        self.num_events: dict[str, int] = {}
        self._progress = asyncio.Condition()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def stream(self, model: str, name: str, max_tokens: int = ANSWER) -> list[str]:
        """The data of all events, or one that begins with the status of a refusal."""
        body = {
            "model": model,
            "stream": True,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logit_bias": ENDLESS,
            "messages": [{"role": "user", "content": f"Tell the story of {name}."}],
        }
        events = []
        async with self._http.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                return [f"{response.status_code} {(await response.aread()).decode()}"]
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                    self.num_events[name] = len(events)
                    async with self._progress:
                        self._progress.notify_all()
        return events

    async def complete(self, model: str, prompt: str, max_tokens: int) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logit_bias": ENDLESS}
        answer = await self._http.post("/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    async def metrics(self) -> str:
        return (await self._http.get(f"{self._address}/metrics")).text

    async def until_answered(self, model: str) -> None:
        """Until the endpoint has seen that the model's new replica is there."""
        async with asyncio.timeout(WAIT_S):
            while not is_whole(await self.stream(model, "a first answer", 8)):
                pass

    async def until_begun(self, names: list[str]) -> None:
        """Until some tokens of each stream have come."""
        async with asyncio.timeout(WAIT_S):
            for name in names:
                async with self._progress:
                    await self._progress.wait_for(lambda name=name: self.num_events.get(name, 0) >= 5)


def is_whole(events: list[str]) -> bool:
    return events[-1] == "[DONE]"


@contextlib.asynccontextmanager
async def asking(client: Client, model: str) -> AsyncIterator[list[list[str]]]:
    """Short requests one after the other for as long as the block runs; what came of them."""
    answers: list[list[str]] = []
    should_end = asyncio.Event()

    async def ask() -> None:
        while not should_end.is_set():
            answers.append(await client.stream(model, f"{model} {len(answers)}", 8))
            await asyncio.sleep(0.3)  # cores for what starts meanwhile

    task = asyncio.create_task(ask())
    try:
        yield answers
    finally:
        should_end.set()
        await task
