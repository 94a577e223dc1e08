"""Ingests ever newer versions of a few files into the folder given, until somebody kills it. Tells on its output what
was acknowledged: `ready`, then `<file> <number>` for each accepted upload."""

from __future__ import annotations

import asyncio
import sys
from itertools import count
from pathlib import Path

from services.errors import ApiError
from tests.services.ingesting import OWNER, running

NAMES = ("a.md", "b.txt", "c.txt")
DELETED_NAME = "d.txt"


def content(name: str, number: int) -> bytes:
    """Versions differ in length, so that counts tell them apart."""
    rules = "\n\n".join(f"Rule {n} of {name} in version {number}." for n in range(20 + number % 7))
    return f"# {name}\n\n{rules}".encode()


async def main(home: Path, first: int) -> None:
    async with running(home) as windfarm:
        if not windfarm.knowledge.list_collections(OWNER):
            windfarm.create()
        print("ready", flush=True)
        for number in count(first):
            for name in NAMES:
                await windfarm.service.submit("handbook", name, content(name, number), OWNER)
                print(name, number, flush=True)
            job = await windfarm.ingest("handbook", DELETED_NAME, content(DELETED_NAME, number))
            if job["document_id"] is not None:
                try:
                    await windfarm.service.delete_document("handbook", job["document_id"], OWNER)
                except ApiError as error:
                    print(error, file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
