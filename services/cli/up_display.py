"""What a person sees while windfarm starts: each application, its state, and what it waits for.

On a terminal a table that changes in place; elsewhere one line for each change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cluster.catalogue import Format
from cluster.home import Home
from cluster.weights.prepare import prepared_path
from services.ray_config import RayConfig

GOOD = ("RUNNING", "HEALTHY")


class Display:
    """Use as a context manager; `show` takes what the conductor says, `say` a line."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._lines: dict[str, str] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False)

    def show(self, status: Mapping[str, Any]) -> None:
        rows = describe(status)
        if self._console.is_terminal:
            self._live.update(self._table(rows))
            return
        for name, text in rows.items():
            if self._lines.get(name) != text:
                self._lines[name] = text
                self.say(f"{time.monotonic() - self._started:6.1f} s  {name}: {text}")

    def _table(self, rows: Mapping[str, str]) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, text in rows.items():
            is_good = text == "ready"
            mark: Text | Spinner = Text("✓", style="green") if is_good else Spinner("dots")
            table.add_row(mark, name, Text(text, style="dim"))
        table.add_row("", "", Text(f"{time.monotonic() - self._started:.0f} s", style="dim"))
        return table


def describe(status: Mapping[str, Any]) -> dict[str, str]:
    """One short text for Ray and for each application: what it does or waits for."""
    phase = status.get("phase", "starting")
    rows = {"ray": "ready" if phase == "ready" else str(phase)}
    pending = {item["application"]: item for item in status.get("pending", ())}
    for name, app in status.get("applications", {}).items():
        if app["status"] in GOOD:
            rows[name] = "ready"
        elif name in pending:
            rows[name] = f"{pending[name]['deployment']} is pending: {pending[name]['reason']}"
        else:
            message = app["message"].strip().splitlines()
            rows[name] = f"{app['status'].lower()}{': ' + message[-1] if message else ''}"
    return rows


def prepare_models(config: RayConfig, home: Home) -> None:
    """Make or fetch what is missing, with a progress bar for each model."""
    from cluster.weights.__main__ import prepare_all
    from services.supervisor import models_to_prepare

    missing = [target for target in models_to_prepare(config) if not _is_prepared(target, home)]
    if missing:
        prepare_all(missing, home)


def _is_prepared(target: tuple[str, Format], home: Home) -> bool:
    from cluster.catalogue import resolve

    resolved = resolve(target[0])
    if resolved.entry is not None:
        return prepared_path(*target, home) is not None
    return resolved.origin in ("folder", "file", "remote")
