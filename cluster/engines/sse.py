"""Reads server-sent events from a byte stream that is cut anywhere. Pure; only `data` fields matter here."""

from __future__ import annotations

MAX_EVENT_BYTES = 4 << 20


class SseDecoder:
    """`feed` returns the data of each complete event. Comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []

    def feed(self, data: bytes) -> list[str]:
        """Raises `ValueError` for an event that is too long or not UTF-8."""
        events: list[str] = []
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) + sum(map(len, self._lines)) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES >> 20} MiB")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
            elif not line and self._lines:
                events.append(b"\n".join(self._lines).decode())
                self._lines = []
        return events
