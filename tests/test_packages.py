"""`cluster`, `services`, `rag`, `ui` are common names: what is imported must be ours, not some installed package."""

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cluster", "services", "rag", "ui")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_in_this_process_is_ours(package: str) -> None:
    assert Path(importlib.import_module(package).__file__ or "").parent == ROOT / package


def test_the_packages_are_ours_from_any_folder(tmp_path: Path) -> None:
    """As in a replica or an engine process, which start wherever Ray puts them."""
    program = f"import importlib; [print(importlib.import_module(name).__file__) for name in {PACKAGES!r}]"
    answer = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(line).parent for line in answer.stdout.split()] == [ROOT / package for package in PACKAGES]


def test_no_installed_package_takes_one_of_our_names() -> None:
    taken = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if name in PACKAGES and owners != ["windfarm"]
    }
    assert not taken
