"""A plan becomes what Ray Serve is told, and a saved plan is used only where its nodes and sizes are there."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from ray import serve
from ray.serve.config import GangPlacementStrategy, GangRuntimeFailurePolicy
from ray.serve.gang import GangContext

from cluster.errors import PlanError
from cluster.expert_placement import plan
from cluster.placement import Reservation, check_plan, place, read_plan
from cluster.plan import PlanRequest
from cluster.sizing import ModelShape, Workload
from cluster.topology import GIB, Accelerator, Node, Topology
from services.plan_view import plan_data

MIXTURE = ModelShape("mixture", 3, 64, 128, 8, 4, 8, 1000, 512, num_experts=8, experts_per_token=2)
RANK = Reservation(0.3, 3 * GIB)
NODES = Topology(tuple(Node(name, 4, 16 * GIB) for name in ("a", "b", "c")))


def request(**changes) -> PlanRequest:
    return PlanRequest(MIXTURE, Workload(256, 4), **({"tensor": 1, "data": 2} | changes))


def test_ranks_on_different_nodes_are_spread_as_one_gang_that_restarts_as_a_whole() -> None:
    placement = place(plan(NODES, request(replicas=2)), RANK)
    options = placement.deployment_options({})
    gang = options["gang_scheduling_config"]
    assert (gang.gang_size, options["num_replicas"]) == (2, 4)
    assert gang.gang_placement_strategy == GangPlacementStrategy.SPREAD
    assert gang.runtime_failure_policy == GangRuntimeFailurePolicy.RESTART_GANG
    assert options["ray_actor_options"] == {"num_cpus": 0.3, "memory": 3 * GIB}
    assert "placement_group_bundles" not in options


def test_serve_takes_the_options_of_a_gang_that_is_pinned_to_nodes() -> None:
    class Server:
        pass

    made = replace(place(plan(NODES, request(replicas=2)), RANK), nodes=("a", "b"))
    options = made.deployment_options({"a": "id-a", "b": "id-b"})
    deployment = serve.deployment(max_ongoing_requests=8)(Server).options(**options)
    assert deployment.num_replicas == 4
    assert deployment._deployment_config.gang_scheduling_config.gang_size == 2
    assert {"gang_id", "rank", "world_size"} <= {field.name for field in fields(GangContext)}


def test_ranks_on_one_node_are_packed() -> None:
    cards = (Accelerator("H100", 80 * 10**9),) * 4
    placement = place(plan(Topology((Node("gpu", 64, 512 * GIB, cards),)), request(data=4)), Reservation(1, GIB, 1.0))
    assert placement.strategy == "PACK"
    assert placement.deployment_options({})["ray_actor_options"]["num_gpus"] == 1.0


def test_ranks_that_share_nodes_evenly_are_spread_and_not_heaped_on_the_first() -> None:
    two = Topology(NODES.nodes[:2])
    made = plan(two, request(data=4))
    assert [rank.node for rank in made.replicas[0].ranks] == ["a", "a", "b", "b"]
    assert place(made, RANK).strategy == "SPREAD"
    cards = (Accelerator("H100", 80 * 10**9),) * 2
    on_gpus = plan(Topology(tuple(Node(name, 64, 512 * GIB, cards) for name in "abc")), request(data=4))
    assert on_gpus.replicas[0].nodes == ("a", "b")
    assert place(on_gpus, Reservation(1, GIB, 1.0)).strategy == "PACK"


def test_a_saved_plan_says_itself_whether_its_ranks_are_spread(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    cards = (Accelerator("H100", 80 * 10**9),) * 4
    for topology, strategy in (
        (Topology(NODES.nodes[:2]), "SPREAD"),
        (Topology(NODES.nodes[:1]), "PACK"),
        (Topology((Node("gpu", 64, 512 * GIB, cards),)), "PACK"),
    ):
        file.write_text(json.dumps(plan_data(plan(topology, request(data=4)))), encoding="utf-8")
        assert read_plan(file).strategy == strategy


def test_a_tensor_parallel_group_alone_is_no_gang() -> None:
    options = place(plan(NODES, request(tensor=2, data=1)), RANK).deployment_options({})
    assert "gang_scheduling_config" not in options
    assert options["num_replicas"] == 1


def test_experts_are_told_by_rank_and_layer() -> None:
    placement = place(plan(NODES, request()), RANK)
    assert placement.expert_ranks == ((0, 0, 0, 0, 1, 1, 1, 1),) * 3


def saved(tmp_path: Path, **changes) -> Path:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_data(plan(NODES, request(**changes)))), encoding="utf-8")
    return file


def test_a_saved_plan_pins_the_ranks_to_its_nodes(tmp_path: Path) -> None:
    found = read_plan(saved(tmp_path))
    assert (found.nodes, found.data) == (("a", "b"), 2)
    check_plan(found, request(), NODES)
    made = place(plan(NODES, request()), RANK)
    options = replace(made, nodes=found.nodes).deployment_options({"a": "id-a", "b": "id-b", "c": "id-c"})
    assert options["placement_group_bundles"] == [{"CPU": 0.3, "memory": 3.0 * GIB}]
    assert options["placement_group_bundle_label_selector"] == [{"ray.io/node-id": "in(id-a,id-b)"}]


def test_a_plan_for_a_node_that_is_gone_is_refused(tmp_path: Path) -> None:
    left = Topology(tuple(node for node in NODES.nodes if node.name != "b"))
    with pytest.raises(PlanError, match=r"puts ranks on b, which is not in the cluster \(nodes: a, c\)"):
        check_plan(read_plan(saved(tmp_path)), request(), left)


def test_a_plan_of_another_model_or_of_other_sizes_is_refused(tmp_path: Path) -> None:
    found = read_plan(saved(tmp_path))
    with pytest.raises(PlanError, match="the configuration 4 and 1"):
        check_plan(found, request(data=4), NODES)
    other = PlanRequest(ModelShape("other", 3, 64, 128, 8, 4, 8, 1000, 512, num_experts=8), Workload(64), tensor=1)
    with pytest.raises(PlanError, match="is for the model 'mixture', not 'other'"):
        check_plan(found, other, NODES)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"replicas": [], "parallel": {"pipeline": 1}}'])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match="windfarm plan --json"):
        read_plan(file)
    with pytest.raises(PlanError, match="Cannot read"):
        read_plan(tmp_path / "nowhere.json")
