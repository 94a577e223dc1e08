"""The report of gangs: who serves, who was lost, and how many seconds later the model served again."""

import json
from dataclasses import asdict, replace

from services.discovery import ReplicaEndpoint, encode_beat
from services.gang_loss import Loss
from services.gang_tracker import GangTracker
from tests.services.test_gang import APP, Store


class World:
    """Gangs that beat as a clock is moved on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.store = Store()
        self.tracker = GangTracker(self.store, clock=lambda: self.now)
        self.ranks: dict[str, ReplicaEndpoint] = {}

    def start(self, gang: str) -> None:
        for rank in range(2):
            end = ReplicaEndpoint(
                f"{gang}{rank}", APP, f"http://198.18.0.{rank + 1}:9", 7, model="m", gang=gang, rank=rank, gang_size=2
            )
            self.ranks[end.key] = end

    def end(self, gang: str) -> None:
        for key in [key for key, end in self.ranks.items() if end.gang == gang]:
            del self.ranks[key]
            self.store.delete(key)

    def lose(self, gang: str, *, rank: int = 1, is_guess: bool = False) -> None:
        loss = Loss(APP, gang, rank, "its process ended", self.now, is_guess)
        self.store.put(loss.key, json.dumps(asdict(loss)).encode())
        self.end(gang)

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.5)):
            self.now += 0.5
            for key, end in self.ranks.items():
                self.ranks[key] = replace(end, beat=end.beat + 1)
                self.store.put(key, encode_beat(self.ranks[key]))
            self.tracker.look()


def test_the_ranks_of_a_gang_are_listed_with_their_nodes() -> None:
    world = World()
    world.start("g1")
    world.wait(1)
    gang = world.tracker.summary()[APP]["gangs"]["g1"]
    assert gang["is_complete"]
    assert [(rank["rank"], rank["node"]) for rank in gang["ranks"]] == [(0, "198.18.0.1"), (1, "198.18.0.2")]


def test_a_lost_gang_is_reported_with_the_time_until_another_served() -> None:
    world = World()
    world.start("g1")
    world.wait(1)
    world.lose("g1")
    world.wait(20)
    assert world.tracker.summary().get(APP, {"restarts": []})["restarts"] == []
    world.start("g2")
    world.wait(1)
    (restart,) = world.tracker.summary()[APP]["restarts"]
    assert (restart["lost_gang"], restart["gang"], restart["rank"]) == ("g1", "g2", 1)
    assert restart["reason"] == "its process ended"
    assert 20 <= restart["seconds"] <= 21
    assert not world.store.read_all("gang-loss/")


def test_the_rank_that_was_the_cause_takes_the_place_of_a_guess() -> None:
    world = World()
    world.start("g1")
    world.wait(1)
    world.lose("g1", rank=0, is_guess=True)
    world.wait(1)
    world.lose("g1", rank=1)
    world.wait(1)
    world.start("g2")
    world.wait(1)
    (restart,) = world.tracker.summary()[APP]["restarts"]
    assert restart["rank"] == 1
    assert 2 <= restart["seconds"] <= 4


def test_a_gang_whose_ranks_all_fall_silent_is_lost_although_nobody_says_so() -> None:
    world = World()
    world.start("g1")
    world.wait(1)
    world.ranks.clear()
    world.wait(10)
    world.start("g2")
    world.wait(1)
    (restart,) = world.tracker.summary()[APP]["restarts"]
    assert restart["reason"] == "all of its ranks are silent"
    assert 10 <= restart["seconds"] <= 11


def test_an_orderly_stop_and_a_change_of_the_configuration_are_no_loss() -> None:
    world = World()
    world.start("g1")
    world.wait(1)
    world.end("g1")
    world.wait(10)
    world.start("g2")
    world.wait(1)
    world.tracker.expect_change(APP)
    world.lose("g2")  # Serve ends the ranks of an old version one after the other
    world.wait(5)
    world.start("g3")
    world.wait(1)
    assert world.tracker.summary()[APP]["restarts"] == []


def test_each_of_two_lost_gangs_is_reported() -> None:
    world = World()
    world.start("g1")
    world.start("g2")
    world.wait(1)
    world.lose("g1")
    world.wait(2)
    world.lose("g2")
    world.wait(2)
    world.start("g3")
    world.wait(2)
    world.start("g4")
    world.wait(1)
    restarts = world.tracker.summary()[APP]["restarts"]
    assert [(restart["lost_gang"], restart["gang"]) for restart in restarts] == [("g1", "g3"), ("g2", "g4")]
