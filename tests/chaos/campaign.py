"""`make chaos`: all trials of all faults, and the measured column of docs/failure-contract.md.

python -m tests.chaos.campaign                  everything, with a product and real engines (about an hour)
python -m tests.chaos.campaign --no-product     what needs no running product
python -m tests.chaos.campaign --only "relay"   faults whose row contains this; the table is written for them alone
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.chaos import (
    balancer_faults,
    engines,
    grammars,
    knowledge_faults,
    network_cut,
    product_faults,
    provider_faults,
    small_disk,
    stream_faults,
    streams,
)
from tests.chaos.contract import FILE, summary, with_measured
from tests.chaos.faults import Fault
from tests.parts import why_missing
from tests.product import start_product

PARTS = ["faults", "streams", "engines"]


@contextlib.contextmanager
def all_faults(only: str, *, with_product: bool) -> Iterator[list[Fault]]:
    """Those of the product come with a product that runs meanwhile."""

    def chosen(faults: Sequence[Fault]) -> list[Fault]:
        return [fault for fault in faults if only in fault.row]

    groups = (
        stream_faults,
        provider_faults,
        knowledge_faults,
        small_disk,
        balancer_faults,
        network_cut,
        grammars,
    )
    faults = chosen([fault for group in groups for fault in group.faults(False)])
    missing = {fault.row: why for fault in faults if fault.needs and (why := why_missing(fault.needs))}
    for row, why in missing.items():
        print(f"{row}: cannot be tried here: {why}", flush=True)
    faults = [fault for fault in faults if fault.row not in missing]
    if not with_product or not chosen(product_faults.faults(None)):  # type: ignore[arg-type]
        yield faults
        return
    with (
        tempfile.TemporaryDirectory(prefix="windfarm-chaos-") as folder,
        start_product(Path(folder, "home")) as product,
    ):
        yield faults + chosen(product_faults.faults(product))


def try_faults(only: str, num_trials: int | None, *, with_product: bool) -> tuple[int, int]:
    """All faults whose row contains `only`; writes what was measured into the table."""
    measured, num_passed, num_failed = {}, 0, 0
    with all_faults(only, with_product=with_product) as faults:
        if not faults:
            sys.exit(f"No fault's row contains {only!r}.")
        for fault in faults:
            outcomes = asyncio.run(fault.try_often(num_trials or fault.num_trials))
            measured[fault.row] = summary(outcomes)
            problems = [outcome.problem for outcome in outcomes if outcome.problem]
            num_passed, num_failed = num_passed + len(outcomes) - len(problems), num_failed + len(problems)
            print(f"{fault.row}: {measured[fault.row]}; the client sees: {outcomes[0].seen}", flush=True)
            for problem in problems[:3]:
                print("   ", problem, flush=True)
            FILE.write_text(with_measured(FILE.read_text(encoding="utf-8"), measured), encoding="utf-8")
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
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose row contains this")
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
            found = try_faults(options.only, options.trials, with_product=not options.no_product)
        else:
            found = {"streams": try_streams, "engines": try_engines}[part](options.trials)
        total = _sum(total, found)
    print(f"{total[0]} passed, {total[1]} failed")
    sys.exit(total[1] > 0)


if __name__ == "__main__":
    main()
