"""Looks, before anything starts, whether all parts of the configuration fit these nodes at once, as they are planned.

Models that are cut into ranks are planned in turn, each on what the others and everything else leave. Ray decides on
its own where replicas go, so a file is refused only where two orders of placing them both leave something over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.errors import ClusterError, NoFit
from cluster.expert_placement import plan
from cluster.home import Home
from cluster.topology import Topology
from services.config import ModelConfig
from services.node_room import Room
from services.preflight import Demand, Finding, demands
from services.ray_config import RayConfig
from services.resources import GIB, Resources
from services.sharding import is_sharded, num_gangs, plan_model, request_on_card

# What of engine_options makes a model on a GPU smaller than its checkpoint says.
_SHRINKING = frozenset({"quantization", "cpu_offload_gb", "kv_cache_dtype", "hf_overrides"})
_LOWER = "Lower the shares or replicas in ray_config.yaml, or take an application out."


def check_cards(config: RayConfig, home: Home, topology: Topology) -> Iterator[Finding]:
    """Whether each model that is not cut, but computed by vLLM on a GPU, fits on one of these with a single request at
    its full length, which is the least that vLLM starts with. Silent on models whose size is not known for sure."""
    if not topology.has_accelerators:
        return
    for demand in demands(config, home.root):
        model = config.app.models.get(demand.application.removeprefix("llm-"))
        if model is None or demand.deployment != "ModelServer" or is_sharded(model) or not demand.each.num_gpus:
            continue
        try:
            request = request_on_card(model, home)
            if request is not None and not _SHRINKING & model.engine_options.keys():
                plan(topology, request)
        except ClusterError as error:
            yield Finding(f"GPU for {model.id}", False, str(error).rstrip("."), "Change it in ray_config.yaml.")


def check_ranks(config: RayConfig, home: Home, topology: Topology) -> list[Finding]:
    """Whether the ranks of each model, and with them all that the file asks for, have room on these nodes, of which the
    first is the head. The models' files must have been prepared."""
    wanted = demands(config, home.root)
    found = list(_check(config, home, topology, wanted, are_ranks_first=True))
    if all(finding.is_ok for finding in found):
        return found
    return list(_check(config, home, topology, wanted, are_ranks_first=False))


def _check(
    config: RayConfig, home: Home, topology: Topology, wanted: Sequence[Demand], *, are_ranks_first: bool
) -> Iterator[Finding]:
    """What belongs on the head is placed first, as at the start; then the largest, which have the least choice."""
    room = Room(topology)
    sharded = {f"llm-{model.id}": model for model in config.app.models.values() if is_sharded(model)}
    ranks = [demand for demand in wanted if demand.application in sharded]
    others = [demand for demand in wanted if demand.application not in sharded]
    others.sort(key=lambda demand: (not demand.each.is_on_head, -demand.each.memory))
    on_head = [demand for demand in others if demand.each.is_on_head]
    elsewhere = others[len(on_head) :]
    before: list[str] = []
    for demand in [*on_head, *ranks, *elsewhere] if are_ranks_first else [*others, *ranks]:
        model = sharded.get(demand.application)
        if model is None:
            yield _check_replicas(demand, room)
        else:
            yield _check_model(config, model, home, topology, room, before)
        before.append(f"{demand.application}/{demand.deployment}")


def _check_replicas(demand: Demand, room: Room) -> Finding:
    name = f"room for {demand.application}/{demand.deployment}"
    left_over = room.take_all(demand.each, demand.replicas)
    if not left_over:
        return Finding(name, True, f"{demand.replicas} on these nodes")
    text = f"{left_over} of {demand.replicas} find no node that has {_amounts(demand.each)} left beside the rest"
    return Finding(name, False, text, _LOWER)


def _check_model(
    config: RayConfig, model: ModelConfig, home: Home, topology: Topology, room: Room, before: Sequence[str]
) -> Finding:
    name = f"ranks of {model.id}"
    override = config.override(f"llm-{model.id}", "ModelServer")
    replicas = override.first_replicas if override is not None else None
    try:
        gangs = num_gangs(model, replicas)
        if room.has_lost_all_gpus:
            raise NoFit(f"{model.id} does not fit: no whole GPU is left.")
        made, placement = plan_model(model, room.topology, home, gangs)
    except NoFit as error:
        beside = f" (counted is what {', '.join(before)} leave of the nodes)" if before else ""
        return Finding(name, False, str(error).rstrip(".") + beside, "Change it in ray_config.yaml.")
    except ClusterError as error:
        return Finding(name, False, str(error).rstrip("."), "Change it in ray_config.yaml.")
    options = override.ray_actor_options if override is not None else None
    rank = placement.rank
    each = Resources(rank.num_cpus, rank.memory, rank.num_gpus)
    if options is not None:
        each = Resources(options.num_cpus, int(options.memory), options.num_gpus or 0.0)
    left_over = room.take_plan(made, each, placement.nodes) if gangs else 0
    if left_over:
        text = f"{left_over} ranks find no node that has {_amounts(each)} left beside the rest"
        return Finding(name, False, text, _LOWER)
    return Finding(name, True, " ".join(made.reasons))


def _amounts(each: Resources) -> str:
    gpus = f", {each.num_gpus:g} GPUs" if each.num_gpus else ""
    return f"{each.num_cpus:g} CPUs{gpus} and {each.memory / GIB:.1f} GiB"
