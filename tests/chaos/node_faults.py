"""Faults of a product on three nodes of this machine: a rank of a gang is killed, or a node with all that runs there.

It serves a sparse model in two gangs and a dense one in two replicas. One product serves all trials: each waits until
everything serves again, and a killed node is started anew by the command that had started it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from services.local_network import Seat, namespace_seats, namespaces
from services.processes import descendants
from tests.chaos.contract import ROOT
from tests.chaos.faults import Fault, Heard, Outcome, hear, seconds_of, until
from tests.chaos.product_faults import CHAT, LONG, client_of
from tests.chaos.streams import read_events
from tests.e2e.cluster_view import (
    gangs_of,
    num_running,
    num_whole,
    process_of_node,
    replicas_of,
    tag_of,
    wait_for,
)
from tests.e2e.mixture import make_mixture, write_config
from tests.product import Product, start_product

NUM_NODES, NUM_GANGS, NUM_RANKS, NUM_DENSE = 3, 2, 4, 2
NUM_TOKENS = 250
WAIT_S = 240.0


def faults(product: Product) -> list[Fault]:
    return [
        Fault("rank of a gang", 25, partial(kill_a_rank, product), needs="vllm"),
        Fault("worker node", 25, partial(kill_a_node, product), needs="vllm"),
    ]


@contextmanager
def start_nodes(folder: Path) -> Iterator[Product]:
    """The dense model's replicas never share a node, so one of them is on a node that can be killed."""
    config = write_config(folder, make_mixture(folder), dense_apart=True)
    with start_product(folder / "home", ["--local-nodes", str(NUM_NODES), "--config", str(config)]) as product:
        yield product


async def kill_a_rank(product: Product, _folder: Path) -> Outcome:
    async with client_of(product) as http:
        gangs = gangs_of(await until_all_serve(product, http))
        victim = gangs[min(gangs)]["ranks"][1]["pid"]
        return await break_streams(http, "mixture", 16, lambda: os.kill(victim, signal.SIGKILL))


async def kill_a_node(product: Product, _folder: Path) -> Outcome:
    """Not the head's, and one with a replica of the dense model: its streams go on, and then it runs elsewhere."""
    async with client_of(product) as http:
        status = await until_all_serve(product, http)
        (head,) = (node["address"] for node in status["nodes"] if node["is_head"])
        address = next(each["node"] for each in replicas_of(status, "llm-tiny") if each["node"] != head)
        node = Node.find(product, address)
        elsewhere: list[asyncio.Task[tuple[float, Any]]] = []
        is_killed = False

        def kill() -> None:
            nonlocal is_killed
            is_killed = True
            node.kill()
            is_there = asyncio.to_thread(wait_for, product, partial(runs_elsewhere, address))
            elsewhere.append(asyncio.create_task(seconds_of(is_there)))

        try:
            outcome = await break_streams(http, "tiny", 4, kill)  # half of the slots
            seconds, _ = await elsewhere[0]
            print(f"worker node: what ran there ran elsewhere after {seconds:.1f} s", flush=True)
        finally:
            if is_killed:
                node.start_again()
    return outcome


def runs_elsewhere(address: str, status: dict[str, Any]) -> bool:
    is_alive = any(node["alive"] for node in status["nodes"] if node["address"] == address)
    nodes = {replica["node"] for replica in replicas_of(status, "llm-tiny")}
    return not is_alive and address not in nodes and num_running(status, "llm-tiny") == NUM_DENSE


@dataclass(frozen=True)
class Node:
    """A node of this machine beside the head: its process, and how it was started."""

    product: Product
    pid: int
    command: Sequence[str]
    environment: dict[str, str]
    seat: Seat

    @classmethod
    def find(cls, product: Product, address: str) -> Node:
        process, tag = process_of_node(product, address), tag_of(product)
        command, variables = (
            Path(f"/proc/{process.pid}/{file}").read_text().rstrip("\0").split("\0") for file in ("cmdline", "environ")
        )
        seats = namespace_seats(tag, NUM_NODES) if namespaces(tag) else [Seat(address)]
        seat = next(seat for seat in seats if seat.address == address)
        return cls(product, process.pid, command, dict(each.split("=", 1) for each in variables), seat)

    def kill(self) -> None:
        """All at once, as a machine ends; some end by themselves when the first is gone."""
        for pid in (self.pid, *(process.pid for process in descendants(self.pid))):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_again(self) -> None:
        """As a child of this process. From its main thread: the kernel ends a node with the thread that started it."""
        command = list(self.command)
        command[command.index("--parent") + 1] = str(os.getpid())
        with (self.product.home / "logs" / "windfarm.log").open("a") as log:
            subprocess.Popen(
                self.seat.command(command), cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=log
            )


async def until_all_serve(product: Product, http: httpx.AsyncClient) -> dict[str, Any]:
    """Until all nodes, gangs and replicas are there, for Ray and for the endpoint; what Ray says then."""

    def are_there(status: dict[str, Any]) -> bool:
        is_whole = num_whole(status) == NUM_GANGS and num_running(status, "llm-tiny") == NUM_DENSE
        return is_whole and sum(node["alive"] for node in status["nodes"]) == NUM_NODES

    async with asyncio.timeout(WAIT_S):
        while True:
            status = await asyncio.to_thread(wait_for, product, are_there)
            told = (await http.get("/v1/status")).raise_for_status().json()["replicas"]
            ready = [replica["model"] for replica in told if replica["state"] == "ready"]
            if ready.count("mixture") == NUM_RANKS and ready.count("tiny") == NUM_DENSE:
                return status
            await asyncio.sleep(0.5)


async def break_streams(http: httpx.AsyncClient, model: str, num_streams: int, kill: Callable[[], None]) -> Outcome:
    """All of them have begun when it is killed. The time is the longest silence of a stream from there on."""
    before = await num_moved(http, model)
    heard = [Heard() for _ in range(num_streams)]
    asked = [asyncio.create_task(hear(http, body_of(model, n), each)) for n, each in enumerate(heard)]
    await until(
        lambda: all(each.body.count("data: ") >= 5 for each in heard) or any(task.done() for task in asked), WAIT_S
    )
    had_ended = any(task.done() for task in asked)
    kill()
    for each in heard:
        each.longest_silence_s = 0.0
    await asyncio.gather(*asked)
    if had_ended:
        return Outcome(0.0, "-", "a stream ended before all of them ran")
    return judge(heard, await num_moved(http, model) - before)


def body_of(model: str, number: int) -> dict[str, Any]:
    """Another beginning for each: those that begin alike go to one replica."""
    messages = [{"role": "user", "content": f"{number} is the number of a story"}]
    return CHAT | LONG | {"model": model, "messages": messages, "max_tokens": NUM_TOKENS}


async def num_moved(http: httpx.AsyncClient, model: str) -> int:
    """Streams of this model that have gone on at another replica so far."""
    metrics = (await http.get("/metrics")).raise_for_status().text
    found = re.search(rf'^windfarm_streams_moved_total{{model="{model}"}} ([\d.]+)$', metrics, re.MULTILINE)
    return int(float(found[1])) if found else 0


def judge(heard: Sequence[Heard], num_moved: int) -> Outcome:
    """Texts are not compared: computed anew, the best of two tokens that are nearly as good may be the other one."""
    seconds = max(each.longest_silence_s for each in heard)
    cut = [each for each in heard if not each.is_complete]
    problem = None
    if cut:
        problem = f"{len(cut)} of {len(heard)} streams are not whole: {cut[0].status} {cut[0].body[-300:]!r}"
    elif not num_moved:
        problem = "none of the streams went on elsewhere"
    elif wrong := {n for each in heard if (n := read_events(each.body).usage["completion_tokens"]) != NUM_TOKENS}:
        problem = f"a stream has {wrong.pop()} tokens of {NUM_TOKENS}"
    return Outcome(seconds, f"{len(heard)} whole answers, of which {num_moved} went on elsewhere", problem)
