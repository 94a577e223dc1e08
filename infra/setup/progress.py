"""Tells how far set-up is: one line per step, and on a terminal a live line below it. In CI only the steps are told."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO


class Progress:
    """Steps are numbered from 1. `detail` may be called as often as one likes; it costs nothing off a terminal."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._num_steps = num_steps
        self._step = 0
        self._started = self._last_shown = 0.0
        self._live = self._stream.isatty() and not os.environ.get("CI")

    def step(self, title: str) -> None:
        self.finish_line()
        self._step += 1
        self._started = time.monotonic()
        self._print(f"[{self._step}/{self._num_steps}] {title}")

    def detail(self, text: str) -> None:
        """Show what is going on right now, with the seconds since the step began."""
        now = time.monotonic()
        if not self._live or now - self._last_shown < 0.1:
            return
        self._last_shown = now
        width = shutil.get_terminal_size().columns - 1
        line = f"      {now - self._started:4.0f} s  {text}"[:width]
        self._stream.write(f"\r\x1b[K{line}")
        self._stream.flush()

    def note(self, text: str) -> None:
        """Something that whoever set up should know."""
        self.finish_line()
        self._print(f"      {text}")

    def finish_line(self) -> None:
        if self._live and self._last_shown:
            self._stream.write("\r\x1b[K")
            self._last_shown = 0.0

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()
