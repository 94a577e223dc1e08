"""A model replica in a process of its own, without Ray: it announces itself in a folder, or at a URL over the network,
and ends with its input.

python -m tests.chaos.replica_process FOLDER_OR_URL REPLICA_ID hash|llamacpp|vllm SECRET NUM_SLOTS ADDRESS
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, unquote
from urllib.request import ProxyHandler, Request, build_opener

from cluster.engine import Engine
from services.beats import BeatStore
from services.local_network import Seat

MAX_CONTEXT = 2048


class FolderBeats:
    """Where replicas of several processes announce themselves: one file a record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, value: bytes) -> None:
        path = self._folder / quote(key, safe="")
        beside = path.with_name(f".{os.getpid()}")
        beside.write_bytes(value)
        beside.replace(path)

    def delete(self, key: str) -> None:
        (self._folder / quote(key, safe="")).unlink(missing_ok=True)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        found = {}
        for path in self._folder.iterdir():
            key = unquote(path.name)
            if key.startswith(prefix):
                found[key] = path.read_bytes()
        return found


class RemoteBeats:
    """The replica's side of records that are kept elsewhere: like those of Ray, they do not come through a network that
    is cut."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opener = build_opener(ProxyHandler({}))

    def put(self, key: str, value: bytes) -> None:
        self._ask("PUT", key, value)

    def delete(self, key: str) -> None:
        self._ask("DELETE", key)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        raise NotImplementedError("replicas only write")

    def _ask(self, method: str, key: str, value: bytes | None = None) -> None:
        with self._opener.open(Request(f"{self._url}/{quote(key, safe='')}", value, method=method), timeout=2):
            pass


class ReplicaProcess:
    """Starts at once, in its seat; its record appears when it can answer."""

    def __init__(
        self,
        records: Path | str,
        replica_id: str,
        engine: str,
        secret: str,
        num_slots: int = 8,
        seat: Seat | None = None,
    ) -> None:
        """`records`: a folder, or the URL of those who keep them."""
        self.replica_id = replica_id
        seat = seat or Seat("127.0.0.1")
        command = [sys.executable, "-m", "tests.chaos.replica_process", str(records), replica_id, engine, secret]
        command += [str(num_slots), seat.address]
        self._process = subprocess.Popen(seat.command(command), stdin=subprocess.PIPE)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        """In order: streams get a moment to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()


def make(kind: str, num_slots: int) -> Engine:
    if kind == "hash":
        from tests.chaos.hash_engine import HashEngine

        return HashEngine(pace_s=0.01)
    from cluster.engines.choice import EngineChoice, make_engine
    from cluster.engines.settings import EngineSettings
    from cluster.home import open_home
    from cluster.weights.prepare import prepare

    model_format = "gguf" if kind == "llamacpp" else "hf"
    settings = EngineSettings(
        model="tiny",
        location=prepare("tiny", model_format, open_home()),  # type: ignore[arg-type]
        max_context=MAX_CONTEXT,
        parallel_requests=num_slots,
        threads=1,
        options={"dtype": "float32"} if kind == "vllm" else {},
    )
    return make_engine(EngineChoice(kind, model_format, uses_gpu=False), settings)  # type: ignore[arg-type]


async def serve(records: str, replica_id: str, kind: str, secret: str, num_slots: int, address: str) -> None:
    from services.model_service import ModelService

    beats: BeatStore = RemoteBeats(records) if records.startswith("http:") else FolderBeats(Path(records))
    service = ModelService(
        make(kind, num_slots), secret, app="llm-tiny", replica_id=replica_id, beats=beats, host=address
    )
    await service.start()
    await asyncio.to_thread(sys.stdin.read)
    await service.stop(drain_s=0.3)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:5], int(sys.argv[5]), sys.argv[6]))
