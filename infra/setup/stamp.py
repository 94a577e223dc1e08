"""Remembers what a finished set-up installed, so that the next one takes a moment. A stamp is written last and removed
first: an interrupted set-up leaves none and is gone through again, where pip and the model step skip what is done.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

STAMP = "windfarm-setup.json"
INPUTS = ("pyproject.toml", "requirements/base.lock", "requirements/cpu.lock", "requirements/gpu.lock")
DEV_INPUTS = ("requirements/dev.lock",)
CODE = ("infra/setup/install.py", "infra/setup/program.py")


@dataclass(frozen=True)
class Stamp:
    """`asked` is the profile that was asked for (or `auto`), `profile` the one that could be installed."""

    key: str
    dev_key: str | None
    asked: str
    profile: str
    home: str

    def covers(self, wanted: Stamp) -> bool:
        """Whether what is installed is enough for what is wanted. The wanted `profile` is not looked at."""
        dev_is_there = wanted.dev_key is None or self.dev_key == wanted.dev_key
        same_profile = wanted.asked in (self.asked, self.profile)
        return self.key == wanted.key and dev_is_there and same_profile and self.home == wanted.home


def wanted_stamp(root: Path, asked: str, *, dev: bool, home: Path, has_gpu: bool) -> Stamp:
    """The stamp that a finished set-up of the present files would leave. A GPU that comes or goes changes it."""
    key = digest(root, (*INPUTS, *CODE), str(root), str(has_gpu), sys.version)
    return Stamp(key, digest(root, DEV_INPUTS) if dev else None, asked, asked, str(home))


def digest(root: Path, files: tuple[str, ...], *facts: str) -> str:
    state = hashlib.sha256()
    for name in files:
        path = root / name
        state.update(name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"missing") + b"\0")
    for fact in facts:
        state.update(fact.encode() + b"\0")
    return state.hexdigest()


def read_stamp(venv: Path) -> Stamp | None:
    """None where there is none, or one that this code does not understand."""
    try:
        return Stamp(**json.loads((venv / STAMP).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(venv: Path, stamp: Stamp) -> None:
    draft = venv / f"{STAMP}.tmp"
    draft.write_text(json.dumps(asdict(stamp), indent=1))
    draft.replace(venv / STAMP)


def remove_stamp(venv: Path) -> None:
    (venv / STAMP).unlink(missing_ok=True)
