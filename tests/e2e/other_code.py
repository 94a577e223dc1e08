"""Checkouts with other code than this one, for windfarms whose code is changed while they run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.product import ROOT

APPLY = [sys.executable, "-m", "services.cli", "apply"]
"""To be run in such a checkout."""

_NOTE = """

def _noting(constructor):
    async def constructed(*arguments, **options):
        import os, pathlib
        (pathlib.Path({notes!r}) / f"{name}-{{os.getpid()}}").touch()
        await constructor(*arguments, **options)
    return constructed

{name}.__init__ = _noting({name}.__init__)
"""
CHANGED = {
    "services/model_server.py": "ModelServer",
    "services/embedding.py": "Embedding",
    "services/store.py": "Store",
    "services/gateway.py": "Gateway",
    "services/page.py": "Ui",
}
BROKEN = """

async def _broken(self, *arguments, **options):
    raise RuntimeError("there is a fault in this code")

ModelServer.__init__ = _broken
"""
"""For `services/model_server.py`."""


def noting(notes: Path) -> dict[str, str]:
    """For `other_checkout`: each deployment notes the process that it runs in, as a file `NAME-PID` in a new folder."""
    notes.mkdir()
    return {path: _NOTE.format(notes=str(notes), name=name) for path, name in CHANGED.items()}


def other_checkout(folder: Path, appended: Mapping[str, str]) -> Path:
    """Another checkout, with text at the end of some files."""
    for name in ("cluster", "rag", "services", "ui", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy2(ROOT / "ray_config.yaml", folder)
    for path, text in appended.items():
        with (folder / path).open("a", encoding="utf-8") as file:
            file.write(text)
    return folder
