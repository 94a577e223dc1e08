"""`make bench-overhead`: tokens per second through the public endpoint, with keys, limits and waiting rooms on, beside
the bare llama.cpp server: the same model file, threads, slots and context, at 1, 8 and 32 streams, in turn (A B A B).
The load client is a process of its own, whose CPU time is told apart. The last line printed is one JSON object.

    ARGS="--pairs 11 --streams 32"    more of it, or less
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.bench.laptop import MODEL, ROOT, free_port, interval_of_median, run_python, tell
from tests.bench.streaming import stream_chat

CONTEXT = 1024
MANY = 1_000_000_000
"""Limits that are counted and never met."""


@dataclass(frozen=True)
class Run:
    """One load on one server. Times in seconds, `client_cpu_s` of the process that asks."""

    tokens_per_s: float
    first_token_s: float
    client_cpu_s: float
    num_tokens: int


def main() -> None:
    options = read_options()
    if options.client:
        print(json.dumps(load(*json.loads(options.client))))
        return
    with tempfile.TemporaryDirectory(prefix="windfarm-bench-") as folder:
        home = Path(folder, "home")
        run_python(["-m", "cluster.weights", "prepare", "--home", str(home)])
        slots = max(options.streams)
        config = write_config(Path(folder), slots)
        result: dict[str, object] = {"cpus": os.cpu_count(), "pairs": options.pairs, "engine": "llamacpp"}
        with windfarm(home, config) as up, bare_llamacpp(home, slots) as bare:
            gateway = gateway_process(home)
            for num_streams in options.streams:
                result |= compare(options, num_streams, up, bare, gateway)
    print(json.dumps(result))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="alternations of each number of streams")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=48, help="tokens of one answer")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_config(folder: Path, slots: int) -> Path:
    """The default file with as many slots as streams, and limits on."""
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    for application in config["applications"]:
        if application["name"] == f"llm-{MODEL}":
            application["args"] |= {"parallel_requests": slots, "max_context": CONTEXT}
        if application["name"] == "platform":
            application["args"]["limits"] |= {"requests_per_minute": MANY, "tokens_per_minute": MANY}
    path = folder / "ray_config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@contextmanager
def windfarm(home: Path, config: Path) -> Iterator[dict[str, str]]:
    command = [ROOT / ".venv" / "bin" / "windfarm", "up", "--detach", "--json", "--home", home]
    command += ["--port", str(free_port()), "--config", config]
    try:
        up = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        yield json.loads(up.stdout.splitlines()[-1])
    finally:
        down = [ROOT / ".venv" / "bin" / "windfarm", "down", "--home", home]
        subprocess.run(down, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def bare_llamacpp(home: Path, slots: int) -> Iterator[str]:
    model = next((home / "models" / MODEL / "gguf").glob("*.gguf"))
    command = [sys.executable, "-m", "tests.bench.bare_llamacpp", "--model", str(model)]
    command += ["--parallel", str(slots), "--context", str(CONTEXT)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process.stdout.readline().strip() + "/v1"
        finally:
            process.stdin.close()


def gateway_process(home: Path) -> psutil.Process:
    """The process of the public endpoint."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        named = "ServeReplica:platform:Gateway" in " ".join(process.info["cmdline"] or ())
        if named and str(home) in str((process.info["environ"] or {}).get("WINDFARM_HOME")):
            return process
    raise RuntimeError("the process of the public endpoint was not found")


def compare(
    options: argparse.Namespace, num_streams: int, up: dict[str, str], bare: str, gateway: psutil.Process
) -> dict[str, object]:
    """Medians over the pairs; a pair to warm up is not counted."""
    pairs: list[tuple[Run, Run]] = []
    gateway_s: list[float] = []
    for number in range(-1, options.pairs):
        before = gateway.cpu_times()
        ours = ask(up["api"], up["key"], num_streams, options.tokens, number)
        after = gateway.cpu_times()
        theirs = ask(bare, None, num_streams, options.tokens, number)
        if number >= 0:
            pairs.append((ours, theirs))
            gateway_s.append((after.user + after.system - before.user - before.system) / ours.num_tokens)
            tell(
                f"{num_streams} streams: windfarm {ours.tokens_per_s:.1f}, llama.cpp {theirs.tokens_per_s:.1f} tokens/s"
            )
    ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]
    added = [1000 * (ours.first_token_s - theirs.first_token_s) for ours, theirs in pairs]
    return {
        f"ratio_tok_s_{num_streams}": round(statistics.median(ratios), 3),
        f"ratio_tok_s_{num_streams}_interval_95": [round(bound, 3) for bound in interval_of_median(ratios)],
        f"tokens_per_s_{num_streams}": round(statistics.median(ours.tokens_per_s for ours, _ in pairs), 1),
        f"tokens_per_s_llamacpp_{num_streams}": round(statistics.median(theirs.tokens_per_s for _, theirs in pairs), 1),
        f"added_ttft_ms_{num_streams}": round(statistics.median(added), 1),
        f"added_ttft_ms_{num_streams}_interval_95": [round(bound, 1) for bound in interval_of_median(added)],
        f"endpoint_cpu_ms_per_token_{num_streams}": round(1000 * statistics.median(gateway_s), 3),
        f"client_cpu_s_{num_streams}": [
            round(statistics.median(run.client_cpu_s for run in runs), 2) for runs in zip(*pairs, strict=True)
        ],
    }


def ask(base_url: str, key: str | None, num_streams: int, num_tokens: int, number: int) -> Run:
    """The load, from a process of its own."""
    arguments = json.dumps([base_url, key, num_streams, num_tokens, number])
    command = [sys.executable, "-m", "tests.bench.overhead", "--client", arguments]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Run(*json.loads(answer.stdout.splitlines()[-1]))


def load(base_url: str, key: str | None, num_streams: int, num_tokens: int, number: int) -> Sequence[float]:
    """The fields of a `Run`. All streams begin at once; the rate counts from there to the end of the last one."""

    def one(stream: int):  # type: ignore[no-untyped-def]
        prompt = f"Story {number + 2} of reader {stream}: tell me a long story about a lighthouse."
        return stream_chat(base_url, key, MODEL, prompt, num_tokens)

    with ThreadPoolExecutor(num_streams) as threads:
        cpu, started = time.process_time(), time.perf_counter()
        answers = list(threads.map(one, range(num_streams)))
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    tokens = sum(answer.num_tokens for answer in answers)
    return tokens / seconds, statistics.median(answer.first_token_s for answer in answers), cpu_s, tokens


if __name__ == "__main__":
    main()
