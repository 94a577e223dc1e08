"""Processes of vLLM that wait for each other sleep, and no message waits for the next one."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.vllm_plugin import patient_queues

shm_broadcast: Any = pytest.importorskip("vllm.distributed.device_communicators.shm_broadcast")


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """Writer and reader of one of vLLM's queues with our part on; all of it is put back at the end."""
    condition = shm_broadcast.SpinCondition
    for name in ("__init__", "wait", "notify"):
        monkeypatch.setattr(condition, name, getattr(condition, name))
    monkeypatch.setattr(shm_broadcast, "SPINLOOP_EXT_ENABLED", False)
    patient_queues.install()
    writer = shm_broadcast.MessageQueue(n_reader=1, n_local_reader=1)
    reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), rank=0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    yield writer, reader


class Recorder:
    """A poller that notes for how long it was asked to sleep, in milliseconds."""

    def __init__(self, poller: Any) -> None:
        self.poller = poller
        self.asked: list[int] = []

    def poll(self, timeout: int) -> Any:
        self.asked.append(timeout)
        return self.poller.poll(timeout)


def test_a_message_whose_signal_was_lost_is_read_soon(queue: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own reader would sleep on for up to five seconds."""
    writer, reader = queue
    monkeypatch.setattr(shm_broadcast.SpinCondition, "notify", lambda self: None)
    poller = reader._spin_condition.poller = Recorder(reader._spin_condition.poller)
    for number in range(5):
        later = threading.Timer(0.05, writer.enqueue, [number])
        later.start()
        assert reader.dequeue(timeout=30) == number
        later.join()
    assert poller.asked
    assert max(poller.asked) <= 100


def test_a_reader_sleeps_instead_of_spinning(queue: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, reader = queue
    waits = []
    wait = shm_broadcast.SpinCondition.wait
    monkeypatch.setattr(
        shm_broadcast.SpinCondition, "wait", lambda self, timeout_ms=None: waits.append(wait(self, timeout_ms))
    )
    busy = time.thread_time()
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=1)
    assert time.thread_time() - busy < 0.5, "it computed while it waited"
    assert len(waits) < 200


def test_the_longer_it_is_quiet_the_longer_a_reader_sleeps() -> None:
    assert [patient_queues.look_again_ms(quiet) for quiet in (0, 0.005, 0.05, 0.5, 3600)] == [1, 1, 5, 50, 100]
