"""A full or read-only disk ends uploads and chats with a clear error, loses nothing, and can be mended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.requires("tmpfs")
def test_a_full_and_a_read_only_disk_lose_nothing(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.services.ingest_on_small_disk", str(tmp_path)]
    answer = subprocess.run(["unshare", "--mount", *program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
