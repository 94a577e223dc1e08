"""A load client that costs little: keep-alive connections that send the same request again as soon as its answer ended.

It reads no more of HTTP than where an answer ends, because it shares the cores with what it measures, and runs in a
process of its own, whose processor time is told apart. `ask_under_load` starts it, `python -m` runs it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_LENGTH = b"content-length:"
ANSWER_WITHIN_S = 30.0


@dataclass(frozen=True)
class Load:
    """`num_clients` connections for `seconds`. `url` of a POST, `body` as it is sent."""

    url: str
    headers: dict[str, str]
    body: str
    num_clients: int
    seconds: float


@dataclass(frozen=True)
class LoadResult:
    """Latencies in ms, from the request to the last byte of its answer; processor time of the client in seconds."""

    num_answers: int
    seconds: float
    p50_ms: float
    p95_ms: float
    cpu_s: float

    @property
    def per_second(self) -> float:
        return self.num_answers / self.seconds


def ask_under_load(load: Load) -> LoadResult:
    """Run the load in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.load_client", json.dumps(asdict(load))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return LoadResult(**json.loads(done.stdout.splitlines()[-1]))


async def run_load(load: Load) -> LoadResult:
    """All connections are open before the clock starts. Raises `RuntimeError` for an answer that is not 200."""
    url = urlsplit(load.url)
    assert url.hostname is not None and url.port is not None, "the address of a local server"
    request = encode_request(url.netloc, url.path, load.headers, load.body)
    loop = asyncio.get_running_loop()
    clients = [_Client(request) for _ in range(load.num_clients)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, url.hostname, url.port)  # type: ignore[misc]
    cpu, started = time.process_time(), time.perf_counter()
    for client in clients:
        client.start(until=started + load.seconds)
    async with asyncio.timeout(load.seconds + ANSWER_WITHIN_S):
        await asyncio.gather(*(client.done for client in clients))
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    latencies = sorted(latency for client in clients for latency in client.latencies_s)
    return LoadResult(
        len(latencies), seconds, 1000 * percentile(latencies, 0.5), 1000 * percentile(latencies, 0.95), cpu_s
    )


def encode_request(host: str, path: str, headers: Mapping[str, str], body: str) -> bytes:
    data = body.encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + _HEAD_END + data


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank of values in ascending order."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class AnswerReader:
    """Finds the end of HTTP/1.1 answers in bytes that come cut anywhere. Nobody sends ahead: one is read at a time."""

    def __init__(self) -> None:
        self._data = b""
        self._num_missing: int | None = None
        """Of a body with a length; none: the head is not whole, or the body is chunked."""
        self._is_chunked = False

    def feed(self, data: bytes) -> bool:
        """Whether the answer is whole now."""
        if self._num_missing is not None:
            self._num_missing -= len(data)
        else:
            self._data += data
            if not self._is_chunked and not self._read_head():
                return False
        if self._is_chunked:
            return self._end() if self._data.endswith(_LAST_CHUNK) else False
        assert self._num_missing is not None
        return self._end() if self._num_missing <= 0 else False

    def _read_head(self) -> bool:
        head, found, body = self._data.partition(_HEAD_END)
        if not found:
            return False
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"not 200: {self._data[:2000].decode(errors='replace')}")
        lowered = head.lower()
        if (at := lowered.find(_LENGTH)) >= 0:
            self._num_missing = int(lowered[at + len(_LENGTH) :].split(b"\r\n", 1)[0]) - len(body)
        else:
            self._is_chunked, self._data = True, body
        return True

    def _end(self) -> bool:
        self._data, self._num_missing, self._is_chunked = b"", None, False
        return True


class _Client(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self.latencies_s: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._reader = AnswerReader()
        self._sent_at = self._until = 0.0
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or RuntimeError("the server closed a connection"))

    def start(self, until: float) -> None:
        self._until = until
        self._ask()

    def data_received(self, data: bytes) -> None:
        try:
            is_whole = self._reader.feed(data)
        except RuntimeError as error:
            self.done.set_exception(error)
            self._transport.close()
            return
        if not is_whole:
            return
        now = time.perf_counter()
        self.latencies_s.append(now - self._sent_at)
        if now < self._until:
            self._ask()
        elif not self.done.done():
            self.done.set_result(None)
            self._transport.close()

    def _ask(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)


if __name__ == "__main__":
    import uvloop

    print(json.dumps(asdict(uvloop.run(run_load(Load(**json.loads(sys.argv[1])))))))
