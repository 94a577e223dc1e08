"""Ingests a set of files into the folder given, as a client that sends again what was not acknowledged, until all are
in or somebody kills it. Tells on its output: `ready`, `<file> <number>` for each accepted upload, `done <count>`,
`finished`.

Arguments: the data folder, the number of files, a file with the lines of what was acknowledged before."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.knowledge import ACTIVE_JOB_STATES
from tests.services.ingesting import OWNER, HashEmbedder, running

_BATCH_TAKES_S = 0.01
"""So that kills also fall into the embedding and not only around it."""
_KINDS = ("md", "txt", "csv", "html")


def uploads(num_files: int) -> list[tuple[str, int]]:
    """(name, number of the version) in order; every fifth file is replaced by a second version at the end."""
    names = [f"file{number:03}.{_KINDS[number % len(_KINDS)]}" for number in range(num_files)]
    return [(name, 1) for name in names] + [(name, 2) for name in names[::5]]


def content(name: str, version: int) -> bytes:
    number = int(name[4:7])
    rules = [f"Rule {n} of {name} in version {version}" for n in range(8 + number % 50)]
    if name.endswith(".html"):
        return f"<h1>{name}</h1>{''.join(f'<p>{rule}.</p>' for rule in rules)}".encode()
    if name.endswith(".csv"):
        return ("rule,file\n" + "\n".join(f"{rule},{name}" for rule in rules)).encode()
    return f"# {name}\n\n{chr(10).join(f'{rule}.{chr(10)}' for rule in rules)}".encode()


class SlowEmbedder(HashEmbedder):
    async def embed_passages(self, texts: Sequence[str]) -> Any:
        await asyncio.sleep(_BATCH_TAKES_S)
        return await super().embed_passages(texts)


async def main(home: Path, num_files: int, acknowledged: set[str]) -> None:
    async with running(home, embedder=SlowEmbedder()) as windfarm:
        if not windfarm.knowledge.list_collections(OWNER):
            windfarm.create()
        print("ready", flush=True)
        for name, version in uploads(num_files):
            if f"{name} {version}" not in acknowledged:
                await windfarm.service.submit("handbook", name, content(name, version), OWNER)
                print(name, version, flush=True)
        num_done = -1
        while True:
            states = (await windfarm.service.find_jobs(OWNER, limit=0))["summary"]["states"]
            if states["done"] != num_done:
                num_done = states["done"]
                print("done", num_done, flush=True)
            if not any(states[state] for state in ACTIVE_JOB_STATES):
                break
            await asyncio.sleep(0.005)
        assert states["failed"] == states["cancelled"] == 0, states
        print("finished", flush=True)


if __name__ == "__main__":
    told = Path(sys.argv[3])
    asyncio.run(
        main(Path(sys.argv[1]), int(sys.argv[2]), set(told.read_text().splitlines()) if told.exists() else set())
    )
