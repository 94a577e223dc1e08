"""`make chaos`: all trials of all faults, and the measured column of docs/failure-contract.md.

python -m tests.chaos.campaign                  everything, with a product and real engines (about half an hour)
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

from tests.chaos import knowledge_faults, network_cut, product_faults, provider_faults, stream_faults
from tests.chaos.contract import FILE, summary, with_measured
from tests.chaos.faults import Fault, Outcome
from tests.parts import why_missing
from tests.product import start_product


@contextlib.contextmanager
def all_faults(only: str, *, with_product: bool) -> Iterator[list[Fault]]:
    """Those of the product come with a product that runs meanwhile."""

    def chosen(faults: Sequence[Fault]) -> list[Fault]:
        return [fault for fault in faults if only in fault.row]

    found = [*stream_faults.faults(False), *provider_faults.faults(False), *knowledge_faults.faults(False)]
    if (missing := why_missing("namespaces")) is None:
        found += network_cut.faults(False)
    else:
        print(f"No network is cut here: {missing}", flush=True)
    faults = chosen(found)
    if not with_product or not chosen(product_faults.faults(None)):  # type: ignore[arg-type]
        yield faults
        return
    with (
        tempfile.TemporaryDirectory(prefix="windfarm-chaos-") as folder,
        start_product(Path(folder, "home")) as product,
    ):
        yield faults + chosen(product_faults.faults(product))


async def run(fault: Fault, num_trials: int) -> list[Outcome]:
    """All trials of one fault."""
    if fault.run_together:
        return list(await asyncio.gather(*(fault.try_once() for _ in range(num_trials))))
    return [await fault.try_once() for _ in range(num_trials)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose row contains this")
    parser.add_argument("--no-product", action="store_true", help="leave out what needs a running product")
    parser.add_argument("--trials", type=int, help="of each fault (default: what the fault says, mostly 10)")
    options = parser.parse_args()
    logging.disable()  # lost connections by the hundred
    measured, num_passed, num_failed = {}, 0, 0
    with all_faults(options.only, with_product=not options.no_product) as faults:
        if not faults:
            sys.exit(f"No fault's row contains {options.only!r}.")
        for fault in faults:
            outcomes = asyncio.run(run(fault, options.trials or fault.num_trials))
            measured[fault.row] = summary(outcomes)
            problems = [outcome.problem for outcome in outcomes if outcome.problem]
            num_passed, num_failed = num_passed + len(outcomes) - len(problems), num_failed + len(problems)
            print(f"{fault.row}: {measured[fault.row]}; the client sees: {outcomes[0].seen}", flush=True)
            for problem in problems[:3]:
                print("   ", problem, flush=True)
    FILE.write_text(with_measured(FILE.read_text(encoding="utf-8"), measured), encoding="utf-8")
    print(f"{num_passed} passed, {num_failed} failed")
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
