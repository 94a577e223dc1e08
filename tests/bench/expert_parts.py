"""What the parts of the experts' benchmark share: models, prompts, engines in turn, and timers inside the workers."""

from __future__ import annotations

import json
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil

from cluster.engines.parallelism import ExpertRanks, Parallelism, placement_of_partitions
from cluster.engines.settings import EngineSettings
from cluster.expert_balance import balanced_partition
from cluster.home import open_home
from cluster.weights.dense_twins import wide_twin
from cluster.weights.prepare import prepare
from cluster.weights.upcycle import MixtureRecipe, upcycle
from services.local_network import Seat
from tests.engine_process import Replica

QUESTIONS = Path(__file__).resolve().parents[1] / "data" / "multilingual-qa-mini"
LANGUAGES = ("en", "de", "es", "fr", "it")
SKEW = 3.0
DENSE_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Models:
    """Checkpoints made from the bundled model when they are first asked for, kept in one folder."""

    folder: Path

    @property
    def parent(self) -> Path:
        return prepare("tiny", "hf", open_home())

    @property
    def distinct(self) -> Path:
        """Distinct experts in float32: the oracle's. Engines may run it in bfloat16."""
        return self._made(
            "distinct", lambda to: upcycle(self.parent, to, MixtureRecipe(variant="distinct", dtype="float32"))
        )

    @property
    def skewed(self) -> Path:
        return self._made(
            "skewed", lambda to: upcycle(self.parent, to, MixtureRecipe(variant="distinct", router_skew=SKEW))
        )

    @property
    def dense(self) -> Path:
        """As large as the mixture, all of it computed for every token."""
        return self._made("dense", lambda to: wide_twin(self.parent, to, DENSE_BLOCKS))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        folder = self.folder / name
        if not folder.exists():
            tell(f"making the checkpoint {name}")
            make(folder)
        return folder


def questions(model: Path, number: int, *, skip: int = 0) -> list[list[int]]:
    """Token ids of questions, in turn from five languages."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    files = [QUESTIONS / language / "queries.jsonl" for language in LANGUAGES]
    texts = [[json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()] for file in files]
    in_turn = [text for row in zip_longest(*texts) for text in row if text is not None]
    return [tokenizer(text).input_ids for text in in_turn[skip : skip + number]]


def replica(
    folder: Path, parallelism: Parallelism, *, sequences: int = 32, seats: Sequence[Seat] = (), **options: Any
) -> Replica:
    """One core per rank. Workers may be asked to run functions of this benchmark."""
    settings = EngineSettings(
        "m",
        folder,
        max_context=2048,
        parallel_requests=sequences,
        max_queued_requests=10_000,
        threads=parallelism.tensor_parallel_size,
        options=options,
        parallelism=parallelism,
    )
    log = folder.parent / "engines.log"
    return Replica(settings, log, {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}, seats)


def planned(tokens: Sequence[Sequence[int]], num_ranks: int) -> ExpertRanks:
    """The placement for these loads [layer][expert]."""
    return placement_of_partitions([balanced_partition(layer, num_ranks) for layer in tokens])


TOUCH = [[100 + 8 * row + place for place in range(8)] for row in range(32)]
"""Prompts that read all weights: the machine may have taken memory from an engine that stood still for a minute."""


@contextmanager
def only(running: Replica, others: Sequence[Replica]) -> Any:
    """The others' processes stand still, so that their waiting takes nothing from the one that is measured."""
    stopped = [process for other in others if other is not running for process in _processes(other)]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    try:
        yield running
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)


def _processes(running: Replica) -> list[psutil.Process]:
    roots = [psutil.Process(engine.pid) for engine in running.engines]
    return [process for root in roots for process in (root, *root.children(recursive=True))]


def alternate(
    kinds: dict[str, Callable[[], Replica]], measure: Callable[[str, Replica], float], times: int
) -> dict[str, list[float]]:
    """All engines are started, then measured in turn (A B A B), so that disturbances meet them alike."""
    with ExitStack() as stack:
        running = {name: stack.enter_context(make()) for name, make in kinds.items()}
        values: dict[str, list[float]] = {name: [] for name in kinds}
        for round_ in range(-1, times):
            for name, engine in running.items():
                with only(engine, list(running.values())):
                    engine.generate(TOUCH, 2)
                    value = measure(name, engine)
                if round_ >= 0:  # the first round warms up
                    values[name].append(value)
                    tell(f"{name}: {value:.1f}")
    return values


def ratio(values: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the ratios of neighbours in time."""
    return statistics.median(a / b for a, b in zip(values[above], values[below], strict=True))


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def install_timers(worker: Any) -> None:
    """Runs in a worker: adds up the seconds of its steps, of exchange over gloo (and waiting), of counting."""
    import time

    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.v1.worker.cpu_worker import CPUWorker

    from cluster.vllm_plugin.expert_counters import ExpertCounts

    seconds = {"step": 0.0, "exchange": 0.0, "counting": 0.0}

    def timed(kind: str, function: Any) -> Any:
        def run(*args: Any, **more: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                seconds[kind] += time.perf_counter() - begin

        return run

    # In a gang a rank without work of its own takes part in the others' steps with a dummy batch.
    for name in ("execute_model", "sample_tokens", "execute_dummy_batch"):
        setattr(CPUWorker, name, timed("step", getattr(CPUWorker, name)))
    for name in ("all_gatherv", "reduce_scatterv"):
        setattr(CpuCommunicator, name, timed("exchange", getattr(CpuCommunicator, name)))
    for name in ("note_routed", "note_computed", "end_step"):
        setattr(ExpertCounts, name, timed("counting", getattr(ExpertCounts, name)))
    CPUWorker.bench_seconds = seconds


def read_timers(worker: Any) -> dict[str, float]:
    """Runs in a worker: what has been added up since it was last read.

    To be read before each measurement too: a rank that was stopped while it waited for another counts that wait.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    seconds: dict[str, float] = CPUWorker.bench_seconds
    since = dict(seconds)
    seconds.update(dict.fromkeys(seconds, 0.0))
    return since


def start_profiler(worker: Any) -> None:
    """Runs in a worker."""
    from torch.profiler import ProfilerActivity, profile

    worker.bench_profiler = profile(activities=[ProfilerActivity.CPU])
    worker.bench_profiler.start()


def stop_profiler(worker: Any) -> float:
    """Runs in a worker: seconds of exchange over shared memory (and waiting) since the profiler was started. Compiled
    code calls it without Python, so no timer sees it."""
    worker.bench_profiler.stop()
    operations = worker.bench_profiler.key_averages()
    return float(sum(each.self_cpu_time_total for each in operations if each.key.startswith("_C::shm_"))) / 1e6


def turn_counters(worker: Any, on: bool) -> None:
    """Runs in a worker: counting of experts off, and on again."""
    for module in worker.model_runner.model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is None or type(module).__name__ != "RoutedExperts":
            continue
        experts = kernel.fused_experts
        if not hasattr(experts, "layer_kept_aside"):
            experts.layer_kept_aside = experts.counted_layer
        experts.counted_layer = experts.layer_kept_aside if on else None
