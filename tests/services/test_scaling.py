"""What Serve's controller hears of a model: from the replicas' and the endpoints' records, in whole gangs."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, GangSchedulingConfig

from cluster.autoscaling import ScalingGoals
from services.demand import DEMAND_PREFIX, ModelDemand, encode_demand
from services.discovery import ReplicaEndpoint, encode_beat
from services.scaling import ScaleByNeed
from services.scaling_config import SCALING_POLICY
from services.scaling_view import READ_EVERY_S, ScalingView, copies_of

APP = "llm-tiny"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Store(dict[str, bytes]):
    """Counts how often it is read, and may be away."""

    num_reads = 0
    is_away = False

    def put(self, key: str, value: bytes) -> None:
        self[key] = value

    def delete(self, key: str) -> None:
        self.pop(key, None)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        self.num_reads += 1
        if self.is_away:
            raise RuntimeError("GCS is away")
        return {key: value for key, value in self.items() if key.startswith(prefix)}


class World:
    """A model with replicas and one endpoint, as the store shows them, and the view on it."""

    def __init__(self, *, goals: ScalingGoals | None = None) -> None:
        self.store, self.clock = Store(), Clock()
        self.replicas: list[ReplicaEndpoint] = []
        self.demand: ModelDemand | None = ModelDemand()
        self.beat = 0
        self.view = ScalingView(goals or ScalingGoals(), APP, self.store, clock=self.clock, start=lambda work: work())

    def wanted(self, target: int, *, max_replicas: int = 8) -> int:
        """After the next look."""
        self.announce()
        self.clock.now += READ_EVERY_S
        self.view.replicas_wanted(target, max_replicas)  # has the store read
        self.clock.now += 0.1
        return self.view.replicas_wanted(target, max_replicas)

    def announce(self) -> None:
        self.beat += 1
        self.store.clear()
        for each in self.replicas:
            self.store.put(each.key, encode_beat(replace(each, beat=self.beat)))
        if self.demand is not None:
            self.store.put(f"{DEMAND_PREFIX}g1", encode_demand(self.beat, {"tiny": self.demand, "other": BUSY}))


BUSY = ModelDemand(num_waiting=90)


def replica(name: str, running: int = 0, slots: int = 2, **fields: Any) -> ReplicaEndpoint:
    return ReplicaEndpoint(
        name, APP, "http://127.0.0.1:1", 1, model="tiny", running=running, info={"max_concurrency": slots}, **fields
    )


def gang(name: str, running: int = 0, size: int = 4, present: int = 4) -> list[ReplicaEndpoint]:
    return [replica(f"{name}{rank}", running, gang=name, rank=rank, gang_size=size) for rank in range(present)]


def test_replicas_and_what_waits_decide() -> None:
    world = World()
    world.replicas = [replica("a", running=1)]
    assert world.wanted(1) == 1
    world.replicas, world.demand = [replica("a", running=2)], ModelDemand(num_waiting=3)
    assert world.wanted(1) == 4
    assert world.wanted(1, max_replicas=3) == 3


def test_other_models_do_not_matter() -> None:
    world = World()
    other = replace(replica("x", running=2), app="llm-other")
    world.replicas = [replica("a"), other]
    assert world.wanted(1) == 0


def test_a_sleeping_model_is_wanted_by_one_request_and_by_more_where_its_slots_are_known() -> None:
    world = World()
    assert world.wanted(0) == 0
    world.demand = ModelDemand(num_waiting=5)
    assert world.wanted(0) == 1
    world.replicas, world.demand = [replica("a")], ModelDemand()
    assert world.wanted(1) == 0
    world.replicas, world.demand = [], ModelDemand(num_waiting=5)
    assert world.wanted(0) == 4


def test_without_a_word_of_the_endpoints_nothing_changes() -> None:
    world = World()
    world.demand = None
    world.replicas = [replica("a"), replica("b")]
    assert world.wanted(2) == 2


def test_while_the_store_is_away_nothing_changes() -> None:
    world = World()
    world.replicas = [replica("a")]
    assert world.wanted(1) == 0
    world.store.is_away = True
    world.clock.now += 6
    assert world.wanted(1) == 1
    world.store.is_away = False
    assert world.wanted(1) == 0


def test_before_the_first_look_nothing_changes() -> None:
    world = World()
    world.announce()
    assert world.view.replicas_wanted(5, 8) == 5


def test_the_store_is_read_beside_the_loop_and_not_at_every_call() -> None:
    world = World()
    waiting: list[Callable[[], None]] = []
    view = ScalingView(ScalingGoals(), APP, world.store, clock=world.clock, start=waiting.append)
    for _ in range(50):
        view.replicas_wanted(1, 8)
        world.clock.now += 0.1
    assert len(waiting) == 1, "one at a time"
    waiting.pop()()
    num_reads = world.store.num_reads
    for _ in range(10):
        view.replicas_wanted(1, 8)
        for work in waiting:
            work()
        waiting.clear()
        world.clock.now += READ_EVERY_S / 5
    assert world.store.num_reads - num_reads == 2 * 2


def test_records_of_killed_endpoints_are_deleted() -> None:
    world = World()
    world.announce()
    for _ in range(140):
        world.clock.now += READ_EVERY_S
        world.view.replicas_wanted(1, 8)
    assert not world.store


def test_first_tokens_of_before_a_copy_was_added_do_not_ask_for_another_one() -> None:
    world = World(goals=ScalingGoals(slot_use=100.0))
    late = [(0.5, 5.0)] * 10
    world.replicas, world.demand = [replica("a", running=2)], ModelDemand(num_begun=2, first_tokens=late)
    assert world.wanted(1) == 1, "nobody knows how long this copy is there"
    world.clock.now += 10
    assert world.wanted(1) == 2
    world.replicas.append(replica("b", running=2))
    assert world.wanted(2) < 3
    world.clock.now += 10
    assert world.wanted(2) == 3


def test_a_gang_is_one_copy_and_is_asked_for_as_a_whole() -> None:
    world = World()
    world.replicas = gang("g", running=1)
    assert world.wanted(4, max_replicas=12) == 4
    world.demand = ModelDemand(num_waiting=6)
    assert world.wanted(4, max_replicas=12) == 8
    world.demand = ModelDemand(num_waiting=60)
    assert world.wanted(4, max_replicas=12) == 12
    world.replicas, world.demand = [*gang("g"), *gang("h")], ModelDemand()
    assert world.wanted(8, max_replicas=12) == 0


def test_a_gang_without_all_of_its_ranks_is_no_copy() -> None:
    assert len(copies_of([*gang("g"), *gang("h", present=3)])) == 1
    (copy,) = copies_of([*gang("g", running=2)[:3], replace(gang("g")[3], state="draining")])
    assert (copy.num_requests, copy.num_slots, copy.is_leaving) == (6, 8, True)


def test_a_cache_is_known_where_all_ranks_tell_it() -> None:
    ranks = [replace(rank, num_tokens=10, max_tokens=100) for rank in gang("g")]
    assert [(each.num_tokens, each.max_tokens) for each in copies_of(ranks)] == [(40, 400)]
    assert copies_of([*ranks[:3], gang("g")[3]])[0].max_tokens == 0


class InServe:
    """Serve's own autoscaling of one deployment, with our policy; the store is the one given."""

    def __init__(self, world: World, *, gang_size: int = 1, **scaling: Any) -> None:
        policy = AutoscalingPolicy(policy_function=SCALING_POLICY, policy_kwargs={"slot_use": 0.8})
        config = AutoscalingConfig(upscale_delay_s=0, downscale_delay_s=0, policy=policy, **scaling)
        gangs = GangSchedulingConfig(gang_size=gang_size) if gang_size > 1 else None
        self._id = DeploymentID("ModelServer", APP)
        self._state = DeploymentAutoscalingState(self._id)
        info = _Info(DeploymentConfig(autoscaling_config=config, gang_scheduling_config=gangs))
        self.target = self._state.register(info, scaling["min_replicas"])  # type: ignore[arg-type]
        policy_in_serve = _policy_of(self._state._policy)
        assert type(policy_in_serve).__name__ == ScaleByNeed.__name__
        policy_in_serve._view = world.view
        self._world = world

    def tick(self) -> int:
        self._world.wanted(self.target)
        running = [ReplicaID(each.replica_id, self._id) for each in self._world.replicas]
        self._state.update_running_replica_ids(running)
        self.target = self._state.get_decision_num_replicas(self.target)
        return self.target


class _Info:
    target_capacity = None
    target_capacity_direction = None

    def __init__(self, config: DeploymentConfig) -> None:
        self.deployment_config = config


def _policy_of(wrapped: Any) -> Any:
    """Our object, below what Serve puts around it."""
    found = getattr(wrapped, "_base_scaling_policy", wrapped)
    return found.__wrapped__


def test_serve_wakes_a_model_and_lets_it_sleep_again() -> None:
    world = World()
    serve = InServe(world, min_replicas=0, max_replicas=3)
    assert serve.tick() == 0
    world.demand = ModelDemand(num_waiting=1)
    assert serve.tick() == 1
    assert serve.tick() == 1, "it is being started"
    world.replicas, world.demand = [replica("a", running=2)], ModelDemand(num_waiting=2)
    assert serve.tick() == 3
    world.replicas = [replica("a", running=2), replica("b"), replica("c")]
    world.demand = ModelDemand()
    assert serve.tick() == 2
    world.replicas = [replica("a"), replica("b")]
    assert serve.tick() == 1, "Serve goes to zero from one only"
    world.replicas = [replica("a")]
    assert serve.tick() == 0


def test_serve_scales_whole_gangs_also_to_zero() -> None:
    world = World()
    serve = InServe(world, gang_size=4, min_replicas=0, max_replicas=8)
    assert serve.tick() == 0
    world.demand = ModelDemand(num_waiting=1)
    assert serve.tick() == 4
    world.replicas, world.demand = gang("g", running=2), ModelDemand(num_waiting=3)
    assert serve.tick() == 8
    world.replicas, world.demand = [*gang("g"), *gang("h")], ModelDemand()
    assert serve.tick() == 4
    world.replicas = gang("g")
    assert serve.tick() == 0


def test_bounds_hold_whatever_is_wanted() -> None:
    world = World()
    serve = InServe(world, min_replicas=1, max_replicas=2)
    assert serve.tick() == 1
    world.replicas, world.demand = [replica("a", running=2)], ModelDemand(num_waiting=50)
    assert serve.tick() == 2


def test_serve_can_keep_the_policy_and_make_it_again() -> None:
    """Serve stores the class by value and its arguments as JSON."""
    policy = AutoscalingPolicy(policy_function=SCALING_POLICY, policy_kwargs={"first_token_target_s": 1.5})
    again = AutoscalingPolicy.from_serialized_policy_def(
        json.loads(policy.model_dump_json()), cloudpickle.loads(cloudpickle.dumps(policy.get_serialized_policy_def()))
    )
    made = again.get_policy()(**again.policy_kwargs)
    assert made._goals.first_token_target_s == 1.5
    assert math.isclose(made._goals.slot_use, ScalingGoals().slot_use)


def test_goals_are_checked_before_anything_is_scaled() -> None:
    with pytest.raises(ValueError, match="cache_use"):
        ScaleByNeed(cache_use=7)
    with pytest.raises(TypeError):
        ScaleByNeed(target=7)
