"""Progress of `windfarm ingest`: a bar for all files with speed and time left, and one for the file at hand; one line
per file elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services.cli.jobs import duration


class IngestDisplay:
    """Use as a context manager. `num_bytes`: of all files together; the bar follows them, because a page and a book are
    both one file."""

    def __init__(self, num_files: int, num_bytes: int = 0) -> None:
        self._console = Console(stderr=True)
        self._num_files = num_files
        self._num_finished = 0
        self._bytes_finished = 0
        self._num_bytes = num_bytes
        self._progress = Progress(
            TextColumn("{task.description:<40}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._all = self._progress.add_task("all files", total=max(num_bytes + num_files, 1), said="")
        self._file = self._progress.add_task("", total=100, said="")

    @property
    def is_shown(self) -> bool:
        """Whether somebody sees bars, so that it is worth asking for speeds."""
        return self._console.is_terminal

    def __enter__(self) -> IngestDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def progress(self, name: str, state: str, fraction: float, waiting_for: str | None = None) -> None:
        self._progress.update(
            self._file,
            description=f"{name[-28:]} {state}",
            completed=int(100 * fraction),
            said=f"waiting: {waiting_for}" if waiting_for else "",
        )

    def speed(self, summary: Mapping[str, Any]) -> None:
        """`summary`: of the batch's jobs, as the API gives it. Time left counts the files that are not sent yet."""
        said = [f"{self._num_finished}/{self._num_files}"]
        if summary.get("tokens_per_s") is not None:
            said += [f"{summary['tokens_per_s']:.0f} tokens/s", f"{summary['files_per_s']:.2g} files/s"]
        sent, seconds_left = summary.get("num_bytes") or 0, summary.get("seconds_left")
        unfinished = sent - self._bytes_finished
        if seconds_left and unfinished > 0:
            left = seconds_left * max(self._num_bytes - self._bytes_finished, unfinished) / unfinished
            said.append(f"{duration(left)} left")
        self._progress.update(self._all, said=", ".join(said))

    def finished(self, name: str, state: str, reason: str, num_bytes: int = 0) -> None:
        self._num_finished += 1
        self._bytes_finished += num_bytes
        self._progress.update(
            self._all,
            completed=self._bytes_finished + self._num_finished,
            said=f"{self._num_finished}/{self._num_files}",
        )
        self._console.print(f"{state:10} {name}{': ' + reason if reason else ''}", highlight=False, markup=False)
