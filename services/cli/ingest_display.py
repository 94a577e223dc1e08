"""Progress of `windfarm ingest`: a bar for all files and one for the file at hand; one line per file elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class IngestDisplay:
    """Use as a context manager."""

    def __init__(self, num_files: int) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<40}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._all = self._progress.add_task("all files", total=num_files)
        self._file = self._progress.add_task("", total=100)

    def __enter__(self) -> IngestDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def progress(self, name: str, state: str, fraction: float) -> None:
        self._progress.update(self._file, description=f"{name[-30:]} {state}", completed=int(100 * fraction))

    def finished(self, name: str, state: str, reason: str) -> None:
        self._progress.advance(self._all)
        self._console.print(f"{state:10} {name}{': ' + reason if reason else ''}", highlight=False, markup=False)
