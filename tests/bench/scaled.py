"""A running windfarm whose small chat model is scaled, for the benchmarks of scaling.

Engines are limited to 2 slots and 1 thread each: several of them on two cores add slots, no computing power.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import yaml

from services.scaling_config import SCALING_POLICY
from tests.bench.laptop import MODEL, ROOT, free_port

NUM_SLOTS = 2
CONTEXT = 1024
_LOOK_S = 0.1
_OPENER = build_opener(ProxyHandler({}))


def write_config(folder: Path, scaling: Mapping[str, Any], goals: Mapping[str, float]) -> Path:
    """The default file with the model scaled so, and limited as said above."""
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    (model,) = [each for each in config["applications"] if each["name"] == f"llm-{MODEL}"]
    model["args"] |= {"parallel_requests": NUM_SLOTS, "threads": 1, "max_context": CONTEXT}
    policy = {"policy_function": SCALING_POLICY, "policy_kwargs": dict(goals)}
    model["deployments"] = [
        {
            "name": "ModelServer",
            "autoscaling_config": {**scaling, "policy": policy},
            "ray_actor_options": {"num_cpus": 0.25, "memory": 600 << 20},
        }
    ]
    path = folder / "ray_config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Scaled:
    """`api` ends in /v1."""

    api: str
    key: str

    def get(self, path: str) -> str:
        request = Request(self.api.removesuffix("/v1") + path, headers={"Authorization": f"Bearer {self.key}"})
        with _OPENER.open(request, timeout=30) as answer:
            return str(answer.read().decode())

    def num_ready(self) -> int:
        """Replicas of the model that take requests."""
        replicas = json.loads(self.get("/v1/status"))["replicas"]
        return sum(each["model"] == MODEL and each["state"] == "ready" for each in replicas)

    def num_moved(self) -> int:
        """Streams that went on at another replica."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith("windfarm_streams_moved_total{")]
        return sum(int(float(line.rpartition(" ")[2])) for line in lines)

    def wait_for(self, number: int, limit_s: float = 90) -> float:
        """Seconds until so many replicas are ready."""
        return wait_until(lambda: self.num_ready() == number, f"{number} replicas", limit_s)


@contextmanager
def running(home: Path, config: Path) -> Iterator[Scaled]:
    """`windfarm up` on a free port, ended in the end."""
    command = [ROOT / ".venv" / "bin" / "windfarm", "up", "--detach", "--json", "--home", home]
    command += ["--port", str(free_port()), "--config", config]
    try:
        up = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        printed = json.loads(up.stdout.splitlines()[-1])
        yield Scaled(printed["api"], printed["key"])
    finally:
        down = [ROOT / ".venv" / "bin" / "windfarm", "down", "--home", home]
        subprocess.run(down, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def wait_until(condition: Callable[[], bool], what: str, limit_s: float) -> float:
    """Seconds that it took."""
    started = time.perf_counter()
    while not condition():
        if time.perf_counter() - started > limit_s:
            raise RuntimeError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(_LOOK_S)
    return time.perf_counter() - started
