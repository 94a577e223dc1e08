"""`make bench-laptop`: what windfarm costs beside the bare llama.cpp server, and how long it takes to start.

Both serve the same model file with the same threads and slots, in processes of their own, and answer in turn (A B A B),
so that whatever else happens on the machine meets both. The last line printed is one JSON object.

    ARGS="--pairs 15 --starts 5"    more of it
    ARGS=--no-first-ever            without the new clone, which takes minutes: set-up with nothing there, to an answer
"""

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import yaml

from rag.filenames import FOLDER_MARK
from tests.bench.streaming import Timing, stream_chat

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny"
SUBJECTS = (
    "a lighthouse",
    "a mill",
    "two rivers",
    "the harbour",
    "an old map",
    "winter",
    "a clockmaker",
    "the north wind",
)
HANDBOOK = "tests/data/company-kb/gds-way-en/standards"
QUESTION = "How long are logs kept?"
ANSWERING_PAGE = "logging.md"
NUM_RESAMPLES = 10_000


def main() -> None:
    options = read_options()
    with tempfile.TemporaryDirectory(prefix="windfarm-bench-") as folder:
        home = Path(folder, "home")
        run_python(["-m", "cluster.weights", "prepare", "--home", str(home)])
        result = measure(options, home)
        if options.first_ever:
            result |= measure_first_ever(Path(folder))
    print(json.dumps(result))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11, help="alternations (at least 7)")
    parser.add_argument("--starts", type=int, default=3, help="starts of windfarm")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of one answer")
    parser.add_argument(
        "--first-ever",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure a new clone: set-up with nothing there, to the first answer and the first citation",
    )
    options = parser.parse_args()
    if options.pairs < 7 or options.starts < 1:
        parser.error("at least 7 pairs and 1 start are needed")
    return options


def measure(options: argparse.Namespace, home: Path) -> dict[str, object]:
    starts = []
    for number in range(options.starts):
        with running_windfarm(ROOT, home) as (up, seconds):
            starts.append(seconds)
            tell(f"start {number + 1}: first answer after {seconds:.1f} s")
            if number == options.starts - 1:
                with bare_llamacpp(home) as bare:
                    pairs = alternate(options, up, bare)
    return summarise(pairs) | {
        "seconds_to_first_answer": round(statistics.median(starts), 1),
        "seconds_to_first_answer_each": [round(seconds, 1) for seconds in starts],
        "cpus": os.cpu_count(),
    }


def running_windfarm(root: Path, home: Path) -> AbstractContextManager[tuple[dict[str, str], float]]:
    """What `windfarm up` printed, and the seconds from its start to the first token of the first answer."""
    options = ["--detach", "--json", "--home", str(home), "--port", str(free_port())]
    return first_answer(root, home, [str(root / ".venv" / "bin" / "windfarm"), "up", *options])


@contextmanager
def first_answer(
    root: Path, home: Path, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[dict[str, str], float]]:
    """Runs a command that brings windfarm up and prints where as its last line; the same answer as above."""
    windfarm = root / ".venv" / "bin" / "windfarm"
    started = time.perf_counter()
    try:
        up = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        printed = json.loads(up.stdout.splitlines()[-1])
        ready_s = time.perf_counter() - started
        answer = stream_chat(printed["api"], printed["key"], MODEL, "Say hello.", max_tokens=8)
        yield printed, ready_s + answer.first_token_s
    finally:
        subprocess.run([windfarm, "down", "--home", home], cwd=root, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def bare_llamacpp(home: Path) -> Iterator[str]:
    """Address of a bare llama.cpp server with the model, slots and context that windfarm serves by default."""
    model = next((home / "models" / MODEL / "gguf").glob("*.gguf"))
    arguments = next(
        application["args"]
        for application in yaml.safe_load((ROOT / "ray_config.yaml").read_text())["applications"]
        if application["name"] == f"llm-{MODEL}"
    )
    command = [sys.executable, "-m", "tests.bench.bare_llamacpp", "--model", str(model)]
    command += ["--parallel", str(arguments["parallel_requests"])]
    command += ["--context", str(arguments["max_context"] or trained_context())]
    command += ["--threads", str(arguments["threads"] or os.cpu_count())]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process.stdout.readline().strip() + "/v1"
        finally:
            process.stdin.close()


def trained_context() -> int:
    from cluster.catalogue import TINY

    return TINY.max_context


def alternate(options: argparse.Namespace, up: dict[str, str], bare: str) -> list[tuple[Timing, Timing]]:
    """(windfarm, llama.cpp) for one prompt after the other; a pair to warm up is not counted."""
    pairs = []
    for number in range(-1, options.pairs):
        prompt = f"Story {number + 2}: tell me a long story about {SUBJECTS[number % len(SUBJECTS)]}."
        ours = stream_chat(up["api"], up["key"], MODEL, prompt, options.tokens)
        theirs = stream_chat(bare, None, MODEL, prompt, options.tokens)
        if number >= 0:
            pairs.append((ours, theirs))
            tell(f"pair {number + 1}: windfarm {ours.tokens_per_s:.1f}, llama.cpp {theirs.tokens_per_s:.1f} tokens/s")
    return pairs


def summarise(pairs: Sequence[tuple[Timing, Timing]]) -> dict[str, object]:
    ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]
    return {
        "ratio_vs_llamacpp": round(statistics.median(ratios), 3),
        "ratio_interval_95": [round(bound, 3) for bound in interval_of_median(ratios)],
        "pairs": len(pairs),
        "tokens_per_s": round(statistics.median(ours.tokens_per_s for ours, _ in pairs), 1),
        "tokens_per_s_llamacpp": round(statistics.median(theirs.tokens_per_s for _, theirs in pairs), 1),
        "ttft_ms": round(1000 * statistics.median(ours.first_token_s for ours, _ in pairs), 1),
        "ttft_ms_llamacpp": round(1000 * statistics.median(theirs.first_token_s for _, theirs in pairs), 1),
        "tokens_per_answer": statistics.median(ours.num_tokens for ours, _ in pairs),
    }


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the medians of samples drawn again (with a fixed seed) from the values."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES))
    return medians[int(0.025 * NUM_RESAMPLES)], medians[int(0.975 * NUM_RESAMPLES)]


def measure_first_ever(folder: Path) -> dict[str, float]:
    """Seconds from a new clone with no environment and no models, by `make up`, to its first answer, and on from there
    to an answer from the handbook with a right citation. pip's own cache is as it is."""
    clone, home = folder / "clone", folder / "first-home"
    started = time.perf_counter()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    clone_s = time.perf_counter() - started
    environment = {**os.environ, "WINDFARM_HOME": str(home)}
    # Below another make it would say last which folder it leaves.
    command = ["make", "--no-print-directory", "up", f"ARGS=--detach --json --port {free_port()}"]
    with first_answer(clone, home, command, environment) as (_, answer_s):
        tell(f"first ever: clone {clone_s:.1f} s, then `make up` to the first answer {answer_s:.1f} s")
        citation_s = measure_citation(clone, environment)
        tell(f"first ever: then handbook and question to a right citation {citation_s:.1f} s")
    shutil.rmtree(clone)
    return {
        "seconds_first_ever": round(clone_s + answer_s, 1),
        "seconds_first_ever_to_citation": round(clone_s + answer_s + citation_s, 1),
    }


def measure_citation(clone: Path, environment: Mapping[str, str]) -> float:
    """Seconds in which the handbook is ingested and a question about it is answered with a right citation: of the page
    that answers it, and with words that stand there."""
    windfarm = str(clone / ".venv" / "bin" / "windfarm")
    started = time.perf_counter()
    ingest = [windfarm, "ingest", HANDBOOK, "--collection", "handbook"]
    subprocess.run(ingest, cwd=clone, env=environment, stdout=sys.stderr, check=True)
    ask = [windfarm, "ask", "--collection", "handbook", QUESTION, "--json"]
    asked = subprocess.run(ask, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    check_citations(json.loads(asked.stdout)["citations"], clone / HANDBOOK)
    return seconds


def check_citations(citations: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Raises where none is of the page that answers the question, or one quotes what does not stand in its page."""
    if ANSWERING_PAGE not in {cited["document"] for cited in citations}:
        raise RuntimeError(f"{QUESTION} was answered without {ANSWERING_PAGE}: {citations}")
    for cited in citations:
        page = folder.joinpath(*cited["document"].split(FOLDER_MARK))
        if cited["text"] not in page.read_text(encoding="utf-8"):
            raise RuntimeError(f"What is cited does not stand in its page: {cited}")


def run_python(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=sys.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
