"""`python -m tests.bench.question_embedding`: how long the vector of one question takes, and how fast batches are.

Packed bf16 weights against Transformers' own modules, one thread for a question against all, in turn. Processors
without bf16 arithmetic have nothing to compare. The last line is one JSON object.

    --rounds 7 --questions 40    more or fewer of them
    --busy 1                     beside so many processes that compute all the time, as models and the store do
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from cluster.engines import embedding_bert, embedding_torch
from cluster.engines.embedding_choice import OpenedEmbedding, open_embedding
from cluster.home import open_home
from rag.judged_set import read_judged_set
from tests.bench.laptop import tell

QUESTIONS = Path(__file__).resolve().parents[1] / "data" / "multilingual-qa-mini" / "en"
_BATCH, _BATCH_TOKENS = 16, 200
_PAUSE_S = 0.01
WAYS = {
    "packed": (True, True),
    "packed_all_threads": (True, False),
    "plain": (False, True),
    "plain_all_threads": (False, False),
}
"""Whether weights are packed, and whether a question has one thread. The last is how it was before."""


def main() -> None:
    options = read_options()
    with tempfile.TemporaryDirectory(prefix="windfarm-bench-") as home, busy(options.busy):
        models = {True: opened(Path(home), packs=True), False: opened(Path(home), packs=False)}
        texts = [query.text for query in read_judged_set(QUESTIONS).queries][: options.questions]
        token_ids = [text.token_ids for text in models[True].tokenizer.encode(texts, "query: ")]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for number in range(options.rounds + 1):
            for name, (packs, is_alone) in WAYS.items():
                alone = embedding_torch.ALONE_TOKENS if is_alone else 0
                with mock.patch.object(embedding_torch, "ALONE_TOKENS", alone):
                    measured = measure(models[packs], token_ids)
                if number:  # the first one warms up
                    times[name].append(measured)
        print(json.dumps(summary(times) | {"cpus": os.cpu_count(), "busy": options.busy, "rounds": options.rounds}))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--busy", type=int, default=0)
    return parser.parse_args()


def opened(home: Path, *, packs: bool) -> OpenedEmbedding:
    with ExitStack() as stack:
        if not packs:
            stack.enter_context(mock.patch.object(embedding_bert, "pack", lambda model: None))
        return open_embedding("embed", open_home(home), precision="bf16", threads=os.cpu_count() or 1)


@contextmanager
def busy(number: int) -> Iterator[None]:
    processes = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _spin() -> None:
    while True:
        pass


def measure(model: OpenedEmbedding, token_ids: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Milliseconds of a question (median), and tokens per second of a batch."""
    took = []
    for ids in token_ids:
        time.sleep(_PAUSE_S)
        began = time.perf_counter()
        model.engine.embed([ids])
        took.append(1000 * (time.perf_counter() - began))
    batch = [[*ids * _BATCH_TOKENS][:_BATCH_TOKENS] for ids in token_ids[:_BATCH]]
    began = time.perf_counter()
    model.engine.embed(batch)
    return statistics.median(took), sum(map(len, batch)) / (time.perf_counter() - began)


def summary(times: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    before = times["plain_all_threads"]
    result: dict[str, Any] = {}
    for name, rounds in times.items():
        result[name] = {
            "question_ms": round(statistics.median(ms for ms, _ in rounds), 1),
            "question_ratio_to_before": _ratio(ms / old for (ms, _), (old, _) in zip(rounds, before, strict=True)),
            "batch_tokens_per_s": round(statistics.median(speed for _, speed in rounds)),
            "batch_ratio_to_before": _ratio(new / old for (_, new), (_, old) in zip(rounds, before, strict=True)),
        }
        tell(f"{name}: {result[name]}")
    return result


def _ratio(ratios: Iterator[float]) -> float:
    return round(statistics.median(ratios), 3)


if __name__ == "__main__":
    main()
