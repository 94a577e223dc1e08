"""The public endpoint as one process without Ray around it, before one replica: its own listener, database, keys,
access log, waiting rooms and limits. What Ray adds in the product is not in it: the directory of replicas is in memory,
and the limiter's book is in the same process.

`python -m tests.bench.relay_process FOLDER MODEL URL NUM_SLOTS` prints its address and two keys as JSON, the second one
with limits that are never met, and serves until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

from services.accounts import Accounts
from services.discovery import encode_beat
from services.limits import Limits
from tests.bench.announce import endpoint_of
from tests.services.harness import running_endpoint

MANY = 1_000_000_000


class AlwaysNew:
    """A store of records with one replica, which announces itself each time when somebody looks."""

    def __init__(self, model: str, url: str, num_slots: int) -> None:
        self._endpoint = endpoint_of(model, url, num_slots)
        self._beat = 0

    def put(self, key: str, value: bytes) -> None: ...

    def delete(self, key: str) -> None: ...

    def read_all(self, prefix: str) -> dict[str, bytes]:
        self._beat += 1
        return {self._endpoint.key: encode_beat(replace(self._endpoint, beat=self._beat))}


async def serve(folder: Path, model: str, url: str, num_slots: int) -> None:
    logging.basicConfig(filename=folder / "relay.log", level=logging.INFO)
    async with running_endpoint(folder, beats=AlwaysNew(model, url, num_slots)) as running:
        accounts = Accounts(running.database)
        owner = accounts.owner_id()
        assert owner is not None
        limited = accounts.create_key(owner, "limited", Limits(MANY, MANY, MANY))
        print(json.dumps({"url": running.url, "key": running.key, "limited_key": limited}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])))
