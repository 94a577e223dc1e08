"""A test whose part of the machine is missing is left out with a reason (in CI it fails); measured values are shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import find_postgres

ROOT = Path(__file__).resolve().parents[1]
TEST = """
import pytest

@pytest.mark.requires("chromium")
def test_browser():
    raise AssertionError("must not run")

@pytest.mark.xfail(reason="known")
def test_known():
    raise AssertionError

def test_plain(record_property):
    record_property("seconds of it", 1.5)
"""


def run_pytest(folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the test above where no Chromium can be found."""
    (folder / "test_sample.py").write_text(TEST)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"PATH": str(folder), "PYTHONPATH": str(ROOT), **variables}
    options = [
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(folder),
    ]
    command = [sys.executable, "-m", "pytest", "-q", *options, "test_sample.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_elsewhere_the_test_is_left_out_and_says_why(tmp_path: Path) -> None:
    answer = run_pytest(tmp_path)
    assert answer.returncode == 0, answer.stdout
    assert "needs chromium: no Chromium that starts" in answer.stdout
    assert "1 passed, 1 skipped, 1 xfailed" in answer.stdout
    assert "test_plain: seconds of it: 1.5" in answer.stdout


def test_in_ci_a_test_that_is_left_out_fails(tmp_path: Path) -> None:
    answer = run_pytest(tmp_path, CI="true")
    assert answer.returncode == 1
    assert "Left out although CI is set" in answer.stdout
    assert "1 passed, 1 xfailed, 1 error" in answer.stdout


def test_debians_postgresql_is_found_although_it_is_not_in_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_postgres("initdb", tmp_path) is None
    for version in ("9.6", "17", "15"):
        program = tmp_path / version / "bin" / "initdb"
        program.parent.mkdir(parents=True)
        program.touch()
    assert find_postgres("initdb", tmp_path) == str(tmp_path / "17" / "bin" / "initdb")
