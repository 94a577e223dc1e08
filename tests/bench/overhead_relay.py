"""The relay beside the LiteLLM proxy: both before the same backend that does nothing, one worker each, with a key.

windfarm's is the process of its public endpoint without Ray around it, and takes the backend for a replica of a model.
LiteLLM has its own way to the same backend. Latencies are those of one client, through the proxy minus straight to the
backend; requests per second are those of the best rung of a ladder of clients.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.bench import noop_backend
from tests.bench.environments import litellm_folder
from tests.bench.laptop import ROOT, free_port, tell
from tests.bench.load_client import Load, LoadResult, ask_under_load
from tests.bench.overhead_servers import running, wait_for

KINDS = ("whole", "stream")
LITELLM_KEY = "sk-bench"
NUM_SLOTS = 1000
Sample = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Somebody who answers. `endpoint`: the process (tree) whose processor time counts, where there is one."""

    name: str
    url: str
    headers: dict[str, str]
    endpoint: Callable[[], float] | None = None


def measure_relay(folder: Path, rounds: int, rungs: list[int], seconds: float, keep: Callable[[Sample], None]) -> None:
    """`keep` gets one sample for each round; a round to warm up is not counted."""
    folder.mkdir()
    with noop() as backend, relay(folder, backend) as ours, litellm_proxy(folder, backend) as litellm:
        targets = [Target("direct", backend, {}), *ours, Target("litellm", *litellm)]
        for number in range(-1, rounds):
            turn = targets if number % 2 else targets[::-1]
            sample = one_round(turn, rungs, seconds if number >= 0 else min(seconds, 0.5))
            if number >= 0:
                keep(sample)


def one_round(targets: list[Target], rungs: list[int], seconds: float) -> Sample:
    """`KIND.TARGET`: p50 and p95 in ms with one client, requests per second of each rung, ms of processor time per
    request of the highest rung, of the target's own process and of the client."""
    sample: Sample = {}
    for kind in KINDS:
        for target in targets:
            alone = _ask(target, kind, 1, seconds)
            measured: dict[str, Any] = {"p50_ms": alone.p50_ms, "p95_ms": alone.p95_ms}
            if target.endpoint is not None:
                measured |= _climb(target, kind, rungs, seconds)
            sample[f"{kind}.{target.name}"] = measured
            tell(f"{kind} {target.name}: {json.dumps(measured)}")
    return sample


def _climb(target: Target, kind: str, rungs: list[int], seconds: float) -> dict[str, Any]:
    assert target.endpoint is not None
    per_second: dict[str, float] = {}
    for num_clients in rungs:
        before = target.endpoint()
        result = _ask(target, kind, num_clients, seconds)
        cpu_s = target.endpoint() - before
        per_second[str(num_clients)] = round(result.per_second, 1)
    return {
        "per_second": per_second,
        "cpu_ms": 1000 * cpu_s / result.num_answers,
        "client_cpu_ms": 1000 * result.cpu_s / result.num_answers,
    }


def _ask(target: Target, kind: str, num_clients: int, seconds: float) -> LoadResult:
    body: dict[str, Any] = {
        "model": noop_backend.MODEL,
        "messages": [{"role": "user", "content": "Tell me of the sea, please."}],
    }
    body |= {"max_tokens": noop_backend.NUM_TOKENS, "temperature": 0, "stream": kind == "stream"}
    url = f"{target.url}/v1/chat/completions"
    return ask_under_load(Load(url, target.headers, json.dumps(body), num_clients, seconds))


@contextmanager
def relay(folder: Path, backend: str) -> Iterator[list[Target]]:
    """windfarm's endpoint, with a key that has no limits and with one that has."""
    command = [sys.executable, "-m", "tests.bench.relay_process", str(folder), noop_backend.MODEL, backend]
    with _until_closed([*command, str(NUM_SLOTS)]) as (said, pid):
        told = json.loads(said)

        def endpoint() -> float:
            return _cpu_of_tree(pid)

        keys = {"windfarm": told["key"], "windfarm_limited": told["limited_key"]}
        yield [Target(name, told["url"], _bearer(key), endpoint) for name, key in keys.items()]


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def noop() -> Iterator[str]:
    """Address of the backend."""
    with _until_closed([sys.executable, "-m", "tests.bench.noop_backend"]) as (said, _):
        yield said


@contextmanager
def _until_closed(command: list[str]) -> Iterator[tuple[str, int]]:
    """The first line of a process that ends with its standard input, and its id."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.stdin.close()


@contextmanager
def litellm_proxy(folder: Path, backend: str) -> Iterator[tuple[str, dict[str, str], Callable[[], float]]]:
    """Address, headers and processor time of LiteLLM's proxy with one worker and a key, but without a database: its
    client for databases downloads a program when it is set up, so it does less here than windfarm."""
    model = {"model": f"openai/{noop_backend.MODEL}", "api_base": f"{backend}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": noop_backend.MODEL, "litellm_params": model}],
        "general_settings": {"master_key": LITELLM_KEY},
        "litellm_settings": {"telemetry": False},
    }
    path, port = folder / "litellm.yaml", free_port()
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [str(litellm_folder() / "bin" / "litellm"), "--config", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1"]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION"}
    with running(command, environment) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health/liveliness", process)
        yield url, _bearer(LITELLM_KEY), lambda: _cpu_of_tree(process.pid)


def _cpu_of_tree(pid: int) -> float:
    root = psutil.Process(pid)
    times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
    return sum(time.user + time.system for time in times)
