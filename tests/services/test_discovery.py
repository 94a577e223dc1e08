"""Replicas are found while they beat, left out when they fail, and forgotten when they are gone."""

import pytest

from cluster.engine import EngineLoad
from services.beats import RayBeatStore
from services.discovery import Beacon, Directory, ReplicaEndpoint, decode_beat, encode_beat


class MemoryStore:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def delete(self, key: str) -> None:
        self.values.pop(key, None)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self.values.items() if key.startswith(prefix)}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def endpoint(replica_id: str = "r1", **changes) -> ReplicaEndpoint:
    fields = {"app": "llm-tiny", "model": "tiny", "url": "http://127.0.0.1:1", "pid": 1, "info": {"max_context": 8192}}
    return ReplicaEndpoint(replica_id=replica_id, **(fields | changes))


def test_a_beat_comes_back_as_it_was_written() -> None:
    assert decode_beat(encode_beat(endpoint())) == endpoint()


@pytest.mark.parametrize("value", [b"", b"{}", b"[1]", b'{"replica_id": "x", "surprise": 1}'])
def test_a_foreign_record_is_no_beat(value: bytes) -> None:
    with pytest.raises(ValueError):
        decode_beat(value)


async def test_a_replica_is_found_while_it_beats_and_dead_five_seconds_after() -> None:
    store, clock = MemoryStore(), Clock()
    directory = Directory(store, clock=clock)
    beacon = Beacon(store, endpoint(), load=lambda: EngineLoad(2, 1, 30, 400))
    await beacon.start()
    await directory.refresh()
    (found,) = directory.replicas("tiny")
    assert (found.running, found.queued, found.info["max_context"]) == (2, 1, 8192)
    assert (found.num_tokens, found.max_tokens) == (30, 400)
    assert directory.models() == ["tiny"]

    clock.now = 4.9
    assert directory.replicas("tiny")
    assert directory.is_alive("r1")
    clock.now = 5.0
    assert not directory.replicas("tiny")
    assert not directory.is_alive("r1")

    await beacon.set_state("ready")
    await directory.refresh()
    assert directory.replicas("tiny")
    await beacon.stop()
    await beacon.stop()
    assert store.values == {}
    await directory.refresh()
    assert directory.endpoints() == []


async def test_a_draining_replica_gets_no_requests_but_is_still_seen() -> None:
    store = MemoryStore()
    directory = Directory(store)
    beacon = Beacon(store, endpoint())
    await beacon.start()
    await beacon.set_state("draining")
    await directory.refresh()
    assert directory.replicas("tiny") == []
    assert [e.state for e in directory.endpoints("llm-tiny")] == ["draining"]
    assert directory.endpoints("ui") == []
    await beacon.stop()


async def test_a_replica_reported_as_failed_is_left_out_until_its_next_beat() -> None:
    store = MemoryStore()
    directory = Directory(store)
    beacon = Beacon(store, endpoint())
    await beacon.start()
    await directory.refresh()
    directory.report_failure("r1")
    await directory.refresh()
    assert directory.replicas("tiny") == []
    assert directory.is_alive("r1"), "a failed connection alone does not make those who wait there leave"
    await beacon.set_state("ready")
    await directory.refresh()
    assert len(directory.replicas("tiny")) == 1
    await beacon.stop()


async def test_what_a_killed_replica_left_is_deleted_after_a_minute_and_foreign_records_are_ignored() -> None:
    store, clock = MemoryStore(), Clock()
    store.put(endpoint().key, encode_beat(endpoint()))
    store.put("windfarm/other", b"not ours")
    directory = Directory(store, clock=clock)
    await directory.refresh()
    clock.now = 61
    await directory.refresh()
    assert list(store.values) == ["windfarm/other"]


@pytest.mark.integration
def test_rays_store_keeps_the_contract() -> None:
    """Run on the pinned Ray: its key-value store is private API."""
    import ray

    ray.init(num_cpus=0, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        store = RayBeatStore()
        store.put("windfarm/a/1", b"one")
        store.put("windfarm/a/1", b"two")
        store.put("elsewhere/1", b"other")
        assert store.read_all("windfarm/") == {"windfarm/a/1": b"two"}
        store.delete("windfarm/a/1")
        store.delete("windfarm/a/1")
        assert store.read_all("windfarm/") == {}
    finally:
        ray.shutdown()
