"""What all tests share: which parts of the machine a test needs, and what happens where one is missing.

`@pytest.mark.requires("chromium")` leaves a test out where the part is missing and says why; with `CI=true` a test that
is left out for whatever reason is a failure, so that nothing is believed tested that was not.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.parts import why_missing

# The fixtures `product`: the whole product, started once for all tests that ask for it; and `postgres_url`.
pytest_plugins = ["tests.product", "tests.postgres"]

SHARE_PRODUCT = ("tests/test_readme.py", "tests/test_packages.py")

COMPUTING = ("tests/rag/test_chunking.py", "tests/rag/test_parsing.py", "tests/rag/test_tables.py")
"""Large and deep documents: seconds of a processor when alone, minutes beside the gangs' start."""

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In one process, end-to-end tests come last: the running product would take cores from all tests after it. Those
    that end it come after all others.

    In several processes (`-n`), the end-to-end tests come first, since they are the longest that stays in one process.
    """
    is_spread = hasattr(config, "workerinput") or bool(config.getoption("numprocesses", None))
    demanding = {_file(item.nodeid) for item in items if _is_demanding(item)}
    items.sort(
        key=lambda item: (
            _turn_of_several(item, demanding) if is_spread else _is_e2e(item),
            _ends_product(item),
            # Those with a cluster of their own before it is started.
            _ends_product(item) or "product" in getattr(item, "fixturenames", ()),
        )
    )


def _turn_of_several(item: pytest.Item, demanding: set[str]) -> int:
    """vLLM's processes wait for each other by spinning, so two sets of them on two cores take many times as long. The
    gangs, with which the end-to-end tests begin, therefore run beside tests that start nothing; engines, faults and
    long computing come after them."""
    if _shares_product(item.nodeid):
        return 0
    return 2 if _file(item.nodeid) in demanding else 1


def _is_demanding(item: pytest.Item) -> bool:
    is_large = item.nodeid.startswith(("tests/chaos/", *COMPUTING))
    return is_large or item.get_closest_marker("integration") is not None


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _ends_product(item: pytest.Item) -> bool:
    return item.get_closest_marker("ends_product") is not None


def _is_e2e(item: pytest.Item) -> bool:
    return item.get_closest_marker("e2e") is not None


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Deals out whole groups. (xdist's own groups, `--dist loadgroup`, have no effect in pytest 9.2.)"""
    return _Groups(config, log)


class _Groups(LoadScopeScheduling):
    """The end-to-end tests stay in one process: they share one product, and two products would take turns at two
    cores. So do the tests of any other file."""

    def _split_scope(self, nodeid: str) -> str:
        return "product" if _shares_product(nodeid) else _file(nodeid)


def _shares_product(nodeid: str) -> bool:
    file, _, test = nodeid.partition("::")
    return file.startswith("tests/e2e/") or file in SHARE_PRODUCT or "[remote" in test


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Runs before fixtures, so that nothing is started for a test that is left out."""
    for mark in item.iter_markers("requires"):
        for part in mark.args:
            if reason := why_missing(part):
                pytest.skip(f"needs {part}: {reason}")


@pytest.fixture(autouse=True)
def _same_data_folder() -> Generator[None, None, None]:
    """`--home` of a command that a test runs in this process sets the data folder for all that follows."""
    before = os.environ.get("WINDFARM_HOME")
    yield
    if before is None:
        os.environ.pop("WINDFARM_HOME", None)
    else:
        os.environ["WINDFARM_HOME"] = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"Left out although CI is set. {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A whole module may leave itself out while it is collected (`importorskip`)."""
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"Left out although CI is set. {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have measured beside what they assert (`record_property`) stands at the end of the output."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name}: {value}")
