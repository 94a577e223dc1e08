"""Where the logs of a windfarm lie, by application, and how to read their ends."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from services.control import ray_folder_of
from services.setup_errors import ConfigError

LogFile = tuple[str, Path]
FOLLOW_EVERY_S = 0.3
# Serve names a replica's log `replica_<application>_<deployment>_<id>.log`.
_REPLICA = re.compile(r"replica_(?P<application>.+)_(?P<deployment>[A-Za-z]+)_(?P<id>[a-z0-9]+)\.log")


def log_files(home: Path, application: str | None) -> list[LogFile]:
    """Log files with short names: replicas of the last run, and windfarm's own log when no application is named."""
    found = list(_replica_logs(home))
    if application is None:
        own = home / "logs" / "windfarm.log"
        return [*([("windfarm", own)] if own.exists() else []), *found]
    chosen = [(name, path) for name, path in found if name.split("/")[0] == application]
    if not chosen:
        known = sorted({name.split("/")[0] for name, _ in found})
        raise ConfigError(
            f"There are no logs of {application!r}. Applications with logs: {', '.join(known) or 'none'}."
        )
    return chosen


def _replica_logs(home: Path) -> Iterable[LogFile]:
    for path in sorted((ray_folder_of(home) / "session_latest" / "logs" / "serve").glob("replica_*.log")):
        if match := _REPLICA.fullmatch(path.name):
            yield f"{match['application']}/{match['deployment']}", path


def last_lines(path: Path, num_lines: int) -> list[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, num_lines)]


def follow_files(files: list[LogFile], put: Callable[[str], None]) -> None:
    """Print what is added to the files until interrupted."""
    opened = [(name, path.open(encoding="utf-8", errors="replace")) for name, path in files]
    for _, file in opened:
        file.seek(0, 2)
    while True:
        is_quiet = True
        for name, file in opened:
            for line in file:
                is_quiet = False
                put(f"{name}: {line.rstrip()}")
        if is_quiet:
            time.sleep(FOLLOW_EVERY_S)  # files cannot be awaited
