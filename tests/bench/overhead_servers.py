"""What `make bench-overhead` compares, each started as its users start it, with the same model and the same limits of
memory, slots and threads: windfarm, the bare servers of both engines, and Ray Serve LLM as it comes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from services.resources import count_gpus
from tests.bench.environments import CACHE, ray_serve_llm_python
from tests.bench.laptop import MODEL, ROOT, free_port, run_python

CONTEXT = 1024
MANY = 1_000_000_000
"""Limits that are counted and never met."""
START_LIMIT_S = 180
_ENGINE_PROCESS = "VLLM::"
"""vLLM's names for the processes that compute begin so."""
WINDFARM = str(ROOT / ".venv" / "bin" / "windfarm")


@dataclass(frozen=True)
class Server:
    """`api` ends in /v1. `root_pid`: all processes below it belong to the server. `home`: windfarm's data folder."""

    api: str
    key: str | None
    root_pid: int
    home: Path | None = None


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of processor time so far. `outside_s`: of all processes but those that compute; `endpoint_s`: of
    windfarm's public endpoint."""

    outside_s: float
    endpoint_s: float


def cpu_times(server: Server) -> CpuTimes:
    """Of processes that run now; those of these servers stay."""
    outside_s = endpoint_s = 0.0
    root = psutil.Process(server.root_pid)
    for process in (root, *root.children(recursive=True)):
        try:
            times, command = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if command.startswith(_ENGINE_PROCESS):
            continue
        outside_s += times.user + times.system
        if "ServeReplica:platform:Gateway" in command:
            endpoint_s += times.user + times.system
    return CpuTimes(outside_s, endpoint_s)


@contextmanager
def windfarm(home: Path, engine: str, slots: int, engine_options: Mapping[str, Any] | None = None) -> Iterator[Server]:
    """`make up` on a data folder of its own: the default file with as many slots as streams, and limits on."""
    prepare_models(home, engine)
    path = home.with_name(f"{home.name}.yaml")
    path.write_text(yaml.safe_dump(configuration(engine, slots, engine_options or {})), encoding="utf-8")
    command = [WINDFARM, "up", "--detach", "--json", "--home", str(home), "--config", str(path)]
    command += ["--port", str(free_port())]
    try:
        up = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        printed = json.loads(up.stdout.splitlines()[-1])
        state = json.loads((home / "run" / "windfarm.json").read_text(encoding="utf-8"))
        yield Server(printed["api"], printed["key"], state["guardian_pid"], home)
    finally:
        subprocess.run([WINDFARM, "down", "--home", str(home)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def configuration(engine: str, slots: int, engine_options: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    for application in config["applications"]:
        if application["name"] == f"llm-{MODEL}":
            application["args"] |= {"engine": engine, "parallel_requests": slots, "max_context": CONTEXT}
            application["args"] |= {"engine_options": dict(engine_options)}
        if application["name"] == "platform":
            application["args"]["limits"] |= {"requests_per_minute": MANY, "tokens_per_minute": MANY}
    return config


def prepare_models(home: Path, engine: str) -> None:
    """Once in the cache folder of the benchmarks; `home` gets second names of the files."""
    prepared = CACHE / "home"
    model = f"{MODEL}/{'hf' if engine == 'vllm' else 'gguf'}"
    run_python(["-m", "cluster.weights", "prepare", "--home", str(prepared), model, "embed/gguf"])
    shutil.copytree(prepared / "models", home / "models", copy_function=os.link, ignore=shutil.ignore_patterns(".*"))


@contextmanager
def bare_llamacpp(home: Path, slots: int) -> Iterator[Server]:
    model = next((home / "models" / MODEL / "gguf").glob("*.gguf"))
    command = [sys.executable, "-m", "tests.bench.bare_llamacpp", "--model", str(model)]
    command += ["--parallel", str(slots), "--context", str(CONTEXT)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield Server(process.stdout.readline().strip() + "/v1", None, process.pid)
        finally:
            process.stdin.close()


def vllm_options(slots: int) -> dict[str, Any]:
    """The same for all three. On processors float32, so that the kernels that windfarm brings for bfloat16 on such
    machines make no difference: what is compared is the way to the engine, not the engine. On GPUs as vLLM comes."""
    options = {"max_model_len": CONTEXT, "max_num_seqs": slots, "kv_cache_memory_bytes": 2 << 30}
    return options if count_gpus() else options | {"dtype": "float32", "enforce_eager": True}


def vllm_environment() -> dict[str, str]:
    """As windfarm's engine has it. Without windfarm's plugin, which vLLM would load because it is installed here."""
    threads = str(os.cpu_count() or 1)
    on_cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads, "TORCHDYNAMO_DISABLE": "1"}
    return ({} if count_gpus() else on_cpu) | {
        "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def bare_vllm(home: Path, slots: int) -> Iterator[Server]:
    """vLLM's own OpenAI server."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(home / "models" / MODEL / "hf"), "--served-model-name", MODEL]
    command += ["--disable-uvicorn-access-log"]
    for name, value in vllm_options(slots).items():
        command += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    with running(command, vllm_environment()) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield Server(f"http://127.0.0.1:{port}/v1", None, process.pid)


@contextmanager
def ray_serve_llm(home: Path, slots: int) -> Iterator[Server]:
    """Ray Serve LLM's OpenAI application with its defaults, on a Ray of its own."""
    port = free_port()
    given = {"model": str(home / "models" / MODEL / "hf"), "name": MODEL, "port": port, "options": vllm_options(slots)}
    command = [str(ray_serve_llm_python()), "-m", "tests.bench.ray_serve_llm", json.dumps(given)]
    with running(command, vllm_environment()) as process:
        wait_for(f"http://127.0.0.1:{port}/v1/models", process)
        yield Server(f"http://127.0.0.1:{port}/v1", None, process.pid)


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], *, is_quiet: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts, ended in the end. `is_quiet`: what it prints is not shown."""
    output = subprocess.DEVNULL if is_quiet else sys.stderr
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=output)
    try:
        yield process
    finally:
        end_tree(process)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for each in below:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(below, timeout=10)


def wait_for(url: str, process: subprocess.Popen[bytes], headers: Mapping[str, str] | None = None) -> None:
    """Until it answers with 200. Raises `RuntimeError` where the process ends before."""
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it answered; it says why above")
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.5)
    raise RuntimeError(f"{url} did not answer within {START_LIMIT_S} s")
