"""A network cut between nodes: endpoint and replicas each in a network namespace of their own, joined by a bridge, and
the link of the replica that answers goes down among the answers. No packet says goodbye.

    python -m tests.chaos.network_cut TAG        (as root, in the first of three namespaces of that tag)
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from services.listener import start_listener
from services.local_network import Seat, delete_network, make_network, namespace_seats
from tests.chaos.faults import Fault, LossWatch, Outcome, until
from tests.chaos.replica_process import ReplicaProcess
from tests.chaos.stream_faults import STATES, Streams, judged
from tests.services.harness import SECRET, Beats, running_endpoint

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 180


def faults(_quick: bool) -> list[Fault]:
    return [Fault("network cut between nodes", 15, cut_the_network, needs="namespaces")]


async def cut_the_network(_folder: Path) -> Outcome:
    """One trial, in a process in the first namespace."""
    tag = secrets.token_hex(8)
    await asyncio.to_thread(make_network, tag, 3)
    try:
        first = namespace_seats(tag, 3)[0]
        program = first.command([sys.executable, "-m", "tests.chaos.network_cut", tag])
        process = await asyncio.create_subprocess_exec(*program, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        try:
            async with asyncio.timeout(LIMIT_S):
                printed, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    finally:
        await asyncio.to_thread(delete_network, tag)
    return Outcome(**json.loads(printed.splitlines()[-1]))


class Keeper:
    """Keeps the records that replicas send over the network."""

    def __init__(self) -> None:
        self.beats = Beats()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        key = unquote(scope["raw_path"].decode().removeprefix("/"))
        body = (await receive()).get("body", b"")
        if scope["method"] == "PUT":
            self.beats.put(key, body)
        else:
            self.beats.delete(key)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


async def run_trial(tag: str) -> Outcome:
    here, *others = namespace_seats(tag, 3)
    keeper = Keeper()
    listener = await start_listener(keeper, here.address)
    replicas = [ReplicaProcess(listener.url, f"on-{seat.namespace}", "hash", SECRET, seat=seat) for seat in others]
    try:
        with tempfile.TemporaryDirectory(prefix="windfarm-chaos-") as folder:
            async with running_endpoint(Path(folder), states=STATES, beats=keeper.beats) as running:
                await until(lambda: len(running.directory.replicas("tiny")) == 2, 90)
                streams = Streams(running, num_tokens=400)
                await until(lambda: all("content" in heard.body for heard in streams.heard))
                watch, fault_at = LossWatch(running.directory), time.monotonic()
                cut(others[0])
                await streams.end()
                moved = (await running.http.get("/metrics")).text
    finally:
        for replica in replicas:
            replica.close()
        await listener.stop()
    if 'streams_moved_total{model="tiny"}' not in moved:
        return Outcome(streams.longest_silence_s, "-", "no stream was on the node that was cut off")
    return replace(judged(streams), noticed_s=watch.seconds_after(fault_at))


def cut(seat: Seat) -> None:
    """Both directions, and nobody is told."""
    subprocess.run(seat.command(["ip", "link", "set", "wf0", "down"]), check=True)


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(run_trial(sys.argv[1])))))
