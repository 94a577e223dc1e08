"""A lock that many readers share and one writer holds alone. A waiting writer goes before new readers, so that it
cannot starve. Not re-entrant."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_readers = 0
        self._num_waiting_writers = 0
        self._is_writing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_writing and self._num_waiting_writers == 0)
            self._num_readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_readers -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._changed:
            self._num_waiting_writers += 1
            try:
                self._changed.wait_for(lambda: not self._is_writing and self._num_readers == 0)
            finally:
                self._num_waiting_writers -= 1
                self._changed.notify_all()
            self._is_writing = True
        try:
            yield
        finally:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
