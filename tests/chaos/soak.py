"""`make soak MINUTES=60`: mixed traffic with faults on a product of its own, and whether what it holds stays bounded.

Every ten seconds memory, file handles, threads and processes of the whole product, tasks of the endpoint and rows of
the database are noted; they may not grow beyond the limits below between the first fifth of the time and the last.
Away from faults nearly every request has to succeed. Samples and plots are left in build/soak/.

    python -m tests.chaos.soak --minutes 60
    python -m tests.chaos.soak --minutes 1      the short form: one fault
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from services.control import read_state
from services.processes import descendants, tagged
from tests.chaos.line_plot import line_plot
from tests.chaos.product_faults import CHAT, client_of, faults
from tests.product import ROOT, Product, start_product

FOLDER = ROOT / "build" / "soak"
SAMPLE_S = 10.0
NUM_CLIENTS = 6
QUIET_S = 30.0
"""At the end without traffic and faults: what is held then is held for good."""
FAULT_EVERY_S = 120.0
AFTERMATH_S = 10.0
"""After a fault is over, requests may still meet what it left behind."""
MAX_FAILED_SHARE = 0.01
"""Of the requests away from faults."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What the last fifth of the samples may have more than the first one, in the median."""

    share: float
    plus: float

    def allows(self, first: float, last: float) -> bool:
        return last <= first * (1 + self.share) + self.plus


LIMITS: dict[str, Limit] = {
    "memory_mib": Limit(0.10, 150),
    "file_handles": Limit(0.10, 100),
    "threads": Limit(0.10, 50),
    "processes": Limit(0, 2),
    "endpoint_tasks": Limit(0.20, 20),
    "database_rows": Limit(0, 100),
}
"""Rows: the traffic deletes the conversations and documents that it makes. Receipts, journal and jobs that tell of them
are history, which grows with the work, so they are counted apart."""
HISTORY = frozenset({"deletion_receipts", "journal", "jobs", "alembic_version"})


@dataclass(frozen=True, slots=True)
class Asked:
    """One request with its answer. Times are of the monotonic clock; status 0: the connection ended."""

    kind: str
    status: int
    began: float
    ended: float

    def is_within(self, times: Sequence[tuple[float, float]]) -> bool:
        return any(self.began <= end and begin <= self.ended for begin, end in times)


class Traffic:
    """What a mixed population of clients does."""

    def __init__(self, product: Product, seed: int) -> None:
        self._http = client_of(product)
        self._draw = random.Random(seed)
        self.asked: list[Asked] = []

    async def run(self, until: float) -> None:
        kinds = (self.stream, self.chat, self.leave, self.embed, self.search, self.document, self.conversation)
        async with self._http:
            while time.monotonic() < until:
                kind, began = self._draw.choice(kinds), time.monotonic()
                try:
                    status = await kind()
                except httpx.TransportError:
                    status = 0
                self.asked.append(Asked(kind.__name__, status, began, time.monotonic()))
                await asyncio.sleep(self._draw.uniform(0.0, 0.5))

    async def stream(self) -> int:
        return await self._chat(stream=True, max_tokens=self._draw.randint(5, 80))

    async def chat(self) -> int:
        return await self._chat(max_tokens=self._draw.randint(1, 30))

    async def _chat(self, **fields: Any) -> int:
        answer = await self._http.post("/v1/chat/completions", json=CHAT | fields)
        if fields.get("stream") and answer.status_code == 200 and not answer.text.endswith("data: [DONE]\n\n"):
            return 599  # an error event
        return answer.status_code

    async def leave(self) -> int:
        """After the first bytes."""
        body = CHAT | {"stream": True, "max_tokens": 400}
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_raw():
                break
        return answer.status_code

    async def embed(self) -> int:
        body = {"model": "embed", "input": [f"text {self._draw.random()}"]}
        return (await self._http.post("/v1/embeddings", json=body)).status_code

    async def search(self) -> int:
        body = {"query": f"rule {self._draw.randrange(100)}", "top_k": 3}
        return (await self._http.post("/v1/collections/soak/search", json=body)).status_code

    async def document(self) -> int:
        """Put in and taken out again."""
        text = "\n\n".join(f"Rule {self._draw.random()} of the house." for _ in range(20))
        name = f"{self._draw.randrange(10**9)}.md"
        made = await self._http.post(
            "/v1/collections/soak/documents?wait=true", files={"file": (name, text.encode())}, timeout=300
        )
        if made.is_success and (document := made.json()["job"].get("document_id")):
            return (await self._http.delete(f"/v1/collections/soak/documents/{document}")).status_code
        return made.status_code

    async def conversation(self) -> int:
        made = await self._http.post("/v1/conversations", json={"title": "soak"})
        if made.is_success:
            return (await self._http.delete(f"/v1/conversations/{made.json()['id']}")).status_code
        return made.status_code


@dataclass
class Broken:
    outcomes: Counter[str] = field(default_factory=Counter)
    times: list[tuple[float, float]] = field(default_factory=list)
    """When something was broken, on the monotonic clock."""


async def break_things(product: Product, until: float, every_s: float, seed: int) -> Broken:
    """One fault after the other."""
    draw, broken = random.Random(seed), Broken()
    chosen = [fault for fault in faults(product) if fault.row != "head"]  # that one ends the product
    while time.monotonic() + every_s < until:
        await asyncio.sleep(every_s)
        fault, began = draw.choice(chosen), time.monotonic()
        outcome = await fault.try_once(is_timed=False)
        broken.times.append((began, time.monotonic() + AFTERMATH_S))
        told = "as the contract says" if outcome.problem is None else outcome.problem[:200]
        broken.outcomes[f"{fault.row}: {told}"] += 1
    return broken


async def sample_for_ever(product: Product, started: float, samples: list[dict[str, float]]) -> None:
    with (FOLDER / "samples.jsonl").open("w", encoding="utf-8") as file:
        while True:
            found = await asyncio.to_thread(sample, product)
            samples.append({"second": round(time.monotonic() - started, 1)} | found | await endpoint_tasks(product))
            file.write(json.dumps(samples[-1]) + "\n")
            file.flush()
            await asyncio.sleep(SAMPLE_S)


def sample(product: Product) -> dict[str, float]:
    """Of all processes of the product, and of its database. Blocks."""
    state = read_state(product.home / "run")
    assert state is not None
    totals = Counter[str]()
    for process in {*tagged(state.instance), *descendants(state.guardian_pid)}:
        folder = Path(f"/proc/{process.pid}")
        try:
            rollup = (folder / "smaps_rollup").read_text()
            # Proportional: what forks share is counted once.
            memory = int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1]) / 1024
            found = {"memory_mib": memory, "processes": 1, "file_handles": len(list((folder / "fd").iterdir()))}
            found["threads"] = len(list((folder / "task").iterdir()))
        except (OSError, StopIteration):
            continue  # it has ended meanwhile
        totals.update(found)  # type: ignore[arg-type]
    return dict(totals) | rows(product.home / "windfarm.db")


def rows(file: Path) -> dict[str, float]:
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        counts = {name: database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables}
    database.close()
    kept = sum(number for name, number in counts.items() if name not in HISTORY)
    return {"database_rows": kept, "history_rows": sum(counts.values()) - kept}


async def endpoint_tasks(product: Product) -> dict[str, float]:
    """Nothing while the endpoint is away."""
    try:
        async with client_of(product) as http:
            text = (await http.get("/metrics", timeout=5)).text
    except httpx.TransportError:
        return {}
    values = [float(line.split()[1]) for line in text.splitlines() if line.startswith("windfarm_tasks ")]
    return {"endpoint_tasks": values[0]} if values else {}


def judge(samples: Sequence[Mapping[str, float]]) -> list[str]:
    """What grew beyond its limit, between the first fifth of the samples and the last."""
    size, found = max(1, len(samples) // 5), []
    for name, limit in LIMITS.items():
        first, last = (
            statistics.median([each[name] for each in part if name in each] or [0.0])
            for part in (samples[:size], samples[-size:])
        )
        verdict = "ok" if limit.allows(first, last) else "GREW"
        print(f"{name}: {first:.0f} -> {last:.0f} (at most {first * (1 + limit.share) + limit.plus:.0f}) {verdict}")
        if verdict != "ok":
            found.append(name)
    return found


def judge_answers(asked: Sequence[Asked], broken: Sequence[tuple[float, float]]) -> list[str]:
    """What is wrong with the answers: an internal error at any time (requests may be refused or cut while a part is
    away, but a bug is a bug), or too many failures while nothing was `broken`."""
    found = [f"{each.kind} was answered with 500" for each in asked if each.status == 500]
    away = [each for each in asked if not each.is_within(broken)]
    failed = Counter(f"{each.kind} {each.status}" for each in away if not 200 <= each.status < 300)
    share = failed.total() / len(away) if away else 1.0
    print(f"away from faults {failed.total()} of {len(away)} requests failed: {dict(failed)}")
    if share > MAX_FAILED_SHARE:
        found.append(f"{share:.1%} of the requests away from faults failed, at most {MAX_FAILED_SHARE:.0%} may")
    return found


async def run(product: Product, minutes: float, fault_every_s: float | None, seed: int) -> bool:
    async with client_of(product) as http:
        (await http.post("/v1/collections", json={"name": "soak"})).raise_for_status()
    started, samples = time.monotonic(), list[dict[str, float]]()
    busy_s = max(30.0, minutes * 60 - QUIET_S)
    until, fault_every_s = started + busy_s, fault_every_s or min(FAULT_EVERY_S, busy_s / 3)
    sampling = asyncio.create_task(sample_for_ever(product, started, samples))
    clients = [Traffic(product, seed * 1000 + number) for number in range(NUM_CLIENTS)]
    broken, *_ = await asyncio.gather(
        break_things(product, until, fault_every_s, seed), *(client.run(until) for client in clients)
    )
    await asyncio.sleep(QUIET_S)
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)
    for name in (*LIMITS, "history_rows"):
        points = [(each["second"] / 60, each[name]) for each in samples if name in each]
        (FOLDER / f"{name}.svg").write_text(line_plot(points, name.replace("_", " "), "minutes"), encoding="utf-8")
    asked = [each for client in clients for each in client.asked]
    for outcome, number in sorted(broken.outcomes.items()):
        print(f"{number} x {outcome}")
    print(dict(sorted(Counter(f"{each.kind} {each.status}" for each in asked).items())))
    wrong = judge_answers(asked, broken.times)
    wrong += [outcome for outcome in broken.outcomes if not outcome.endswith("as the contract says")]
    wrong += [f"{name} grew" for name in judge(samples)]
    for why in dict.fromkeys(wrong):
        print(f"FAILED: {why}")
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--fault-every-s", type=float, help=f"default: {FAULT_EVERY_S:g}, or a third of the time where that is less"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="windfarm-soak-") as folder,
        start_product(Path(folder, "home")) as product,
    ):
        has_passed = asyncio.run(run(product, options.minutes, options.fault_every_s, options.seed))
    print(f"Samples and plots: {FOLDER}")
    print("passed" if has_passed else "FAILED")
    sys.exit(not has_passed)


if __name__ == "__main__":
    main()
