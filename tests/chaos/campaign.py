"""`make chaos`: all trials of all faults, and the measured column of docs/failure-contract.md.

python -m tests.chaos.campaign                  everything, with products and real engines (about an hour and a half)
python -m tests.chaos.campaign --no-product     what needs no running product
python -m tests.chaos.campaign --only "relay"   faults whose row contains this (or one of several texts); the table is
                                                written for them alone
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from tests.chaos import (
    balancer_faults,
    engines,
    grammars,
    knowledge_faults,
    network_cut,
    node_faults,
    product_faults,
    provider_faults,
    small_disk,
    stream_faults,
    streams,
)
from tests.chaos.contract import FILE, summary, with_measured
from tests.chaos.faults import Fault
from tests.parts import why_missing
from tests.product import Product, start_product

PARTS = ["faults", "streams", "engines"]


Stage = Callable[[Sequence[str]], AbstractContextManager[Sequence[Fault]]]
"""Faults whose row contains one of these texts, with what runs for them meanwhile."""


def chosen(faults: Sequence[Fault], only: Sequence[str]) -> list[Fault]:
    """Those whose row contains one of the texts and that can be tried here."""
    found = [fault for fault in faults if any(text in fault.row for text in only)]
    missing = {fault.row: why for fault in found if fault.needs and (why := why_missing(fault.needs))}
    for row, why in missing.items():
        print(f"{row}: cannot be tried here: {why}", flush=True)
    return [fault for fault in found if fault.row not in missing]


@contextlib.contextmanager
def alone(only: Sequence[str]) -> Iterator[Sequence[Fault]]:
    """Those that start what they need."""
    groups = (
        stream_faults,
        provider_faults,
        knowledge_faults,
        small_disk,
        balancer_faults,
        network_cut,
        grammars,
    )
    yield chosen([fault for group in groups for fault in group.faults(False)], only)


@contextlib.contextmanager
def of_a_product(
    only: Sequence[str],
    faults: Callable[[Product], list[Fault]],
    start: Callable[[Path], AbstractContextManager[Product]],
) -> Iterator[Sequence[Fault]]:
    """Those of a running product, which is started where one of them is wanted."""
    if not (wanted := chosen(faults(None), only)):  # type: ignore[arg-type]  # nothing is tried here
        yield []
        return
    rows = {fault.row for fault in wanted}
    with tempfile.TemporaryDirectory(prefix="windfarm-chaos-") as folder, start(Path(folder)) as product:
        yield [fault for fault in faults(product) if fault.row in rows]


STAGES: list[Stage] = [alone]
OF_PRODUCTS: list[Stage] = [
    partial(of_a_product, faults=product_faults.faults, start=lambda folder: start_product(folder / "home")),
    partial(of_a_product, faults=node_faults.faults, start=node_faults.start_nodes),
]


def try_faults(only: Sequence[str], num_trials: int | None, *, with_product: bool) -> tuple[int, int]:
    """All faults whose row contains one of the texts; writes what was measured into the table."""
    num_passed = num_failed = 0
    for stage in STAGES + (OF_PRODUCTS if with_product else []):
        with stage(only) as faults:
            for fault in faults:
                outcomes = asyncio.run(fault.try_often(num_trials or fault.num_trials))
                measured = summary(outcomes)
                problems = [outcome.problem for outcome in outcomes if outcome.problem]
                num_passed, num_failed = num_passed + len(outcomes) - len(problems), num_failed + len(problems)
                print(f"{fault.row}: {measured}; the client sees: {outcomes[0].seen}", flush=True)
                for problem in problems[:3]:
                    print("   ", problem, flush=True)
                FILE.write_text(
                    with_measured(FILE.read_text(encoding="utf-8"), {fault.row: measured}), encoding="utf-8"
                )
    if num_passed + num_failed == 0:
        sys.exit(f"No fault that can be tried here has a row that contains {' or '.join(map(repr, only))}.")
    return num_passed, num_failed


def try_streams(num_trials: int | None) -> tuple[int, int]:
    return asyncio.run(streams.campaign(num_trials or 20, first_seed=1))


def try_engines(num_trials: int | None) -> tuple[int, int]:
    found = asyncio.run(engines.campaign("llamacpp", num_trials or 10))
    if why_missing("vllm") is None:
        found = _sum(found, asyncio.run(engines.campaign("vllm", num_trials or 10)))
    return found


def _sum(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    return first[0] + second[0], first[1] + second[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="faults whose row contains one of these")
    parser.add_argument("--no-product", action="store_true", help="leave out what needs a running product")
    parser.add_argument("--trials", type=int, help="of each fault (default: what the fault says, mostly 10)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    options = parser.parse_args()
    logging.disable()  # lost connections by the hundred
    total = (0, 0)
    # `--only` is about faults, so it asks for nothing else.
    for part in ["faults"] if options.only else options.parts:
        print(f"--- {part}", flush=True)
        if part == "faults":
            found = try_faults(options.only or [""], options.trials, with_product=not options.no_product)
        else:
            found = {"streams": try_streams, "engines": try_engines}[part](options.trials)
        total = _sum(total, found)
    print(f"{total[0]} passed, {total[1]} failed")
    sys.exit(total[1] > 0)


if __name__ == "__main__":
    main()
