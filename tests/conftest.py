"""What all tests share: which parts of the machine a test needs, and what happens where one is missing.

`@pytest.mark.requires("chromium")` leaves a test out where the part is missing and says why; with `CI=true` a test that
is left out for whatever reason is a failure, so that nothing is believed tested that was not.
"""

import os
from collections.abc import Generator

import pytest

from tests.parts import why_missing

# The fixtures `product`: the whole product, started once for all tests that ask for it; and `postgres_url`.
pytest_plugins = ["tests.product", "tests.postgres"]

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """In one process, end-to-end tests come last: the running product would take cores from all tests after it. Those
    that end it come after all others.

    In several processes (`-n`), what takes longest comes first, so that none ends long after the others; what is
    started once for several tests stays in one process.
    """
    is_spread = hasattr(config, "workerinput") or bool(config.getoption("numprocesses", None))
    items.sort(key=lambda item: (_is_e2e(item) != is_spread, item.get_closest_marker("ends_product") is not None))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _is_e2e(item: pytest.Function) -> bool:
    return item.get_closest_marker("e2e") is not None


def _group(item: pytest.Function) -> str:
    """The end-to-end tests share one product; all others share at most what their file starts."""
    return "product" if _is_e2e(item) or "product" in item.fixturenames else item.nodeid.partition("::")[0]


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
