"""`make bench-experts`: experts in pieces, exactly; what it gains, what it costs. The last line is one JSON object.

    ARGS="--only exact --prompts 16"            a part of it (exact, imbalance, ratio, gain, sparse, counters)
    ARGS="--only ratio --results so-far.json"   adds to what earlier runs measured, and prints all of it

Engines run alone, without HTTP. What is compared is measured in turn in one run. Checkpoints are made from the bundled
model once (about 6 GB) in `--models`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.bench.expert_exactness import WAYS, Keep, measure_exactness, measure_imbalance
from tests.bench.expert_parts import Models
from tests.bench.expert_speed import measure_counters, measure_placement_gain, measure_ratio, measure_sparse

PARTS = ("exact", "imbalance", "ratio", "gain", "sparse", "counters")


def main() -> None:
    options = read_options()
    # So that engines end in their usual way; those that stand still at that moment could not end by themselves.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    results: dict[str, Any] = {}
    if options.results is not None and options.results.exists():
        results = json.loads(options.results.read_text("utf-8"))
    options.models.mkdir(parents=True, exist_ok=True)
    models = Models(options.models)

    def keep(measured: dict[str, Any]) -> None:
        results.update(measured)
        if options.results is not None:
            options.results.write_text(json.dumps(results), "utf-8")

    for part in options.only or PARTS:
        keep(measure(part, models, options, results, keep))
    shown = {name: value for name, value in results.items() if name not in ("skewed_load", "distinct_load")}
    print(json.dumps(shown | {"cpus": os.cpu_count()}))


def measure(
    part: str, models: Models, options: argparse.Namespace, results: dict[str, Any], keep: Keep
) -> dict[str, Any]:
    match part:
        case "exact":
            return measure_exactness(models, options.prompts, options.tokens, options.ways, results, keep)
        case "imbalance":
            return measure_imbalance(models, options.trace_prompts, options.tokens)
        case "ratio":
            return measure_ratio(models, options.times, options.tokens, eager=options.eager)
        case "gain":
            measured: dict[str, Any] = {}
            if "skewed_load" not in results:
                measured = measure_imbalance(models, options.trace_prompts, options.tokens)
            loads = (results | measured)["skewed_load"]
            return measured | measure_placement_gain(models, loads, options.times, options.tokens)
        case "sparse":
            return measure_sparse(models, options.times, options.tokens)
        case "counters":
            return measure_counters(models, 2 * options.times, options.tokens)
    raise ValueError(part)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure; default: all")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of the exactness part")
    parser.add_argument("--trace-prompts", type=int, default=256, help="prompts of each of the two routing traces")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    names = [way.name for way in WAYS]
    parser.add_argument("--ways", nargs="+", choices=names, default=(), metavar="WAY", help=f"of exact only: {names}")
    parser.add_argument("--eager", action="store_true", help="ratio: engines that are not compiled")
    parser.add_argument("--times", type=int, default=5, help="alternations (at least 5)")
    parser.add_argument("--results", type=Path, help="a file with earlier results, to add to")
    parser.add_argument(
        "--models", type=Path, default=Path.home() / ".cache" / "windfarm-bench", help="folder of checkpoints"
    )
    options = parser.parse_args()
    if options.times < 5 or min(options.prompts, options.trace_prompts) < 1:
        parser.error("at least 5 alternations and 1 prompt are needed")
    return options


if __name__ == "__main__":
    main()
