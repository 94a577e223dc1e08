"""What can be deployed becomes pods that hold it; what cannot is refused with the reason and a next step."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from cluster.errors import PlanError
from cluster.expert_placement import plan
from cluster.known_shapes import KNOWN_SHAPES
from cluster.plan import ExpertLoads, PlanRequest
from cluster.sizing import ModelShape, Workload
from cluster.topology import GB, GIB, Accelerator, Node, Topology
from services.config import ModelConfig
from services.kuberay.deployment import RUNTIME_BYTES, Deployment, deployment_of
from services.kuberay.ray_service import ray_service
from services.kuberay.serve_config import serve_config

MIXTRAL, MISTRAL, LLAMA = (KNOWN_SHAPES[name] for name in ("mixtral-8x7b", "mistral-7b", "llama-2-70b"))


def gpu_nodes(count: int, *, cards: int = 4, gigabytes: int = 40) -> Topology:
    accelerators = (Accelerator("A100-40G", gigabytes * GB),) * cards
    return Topology(tuple(Node(f"gpu-{n}", 64, 512 * GIB, accelerators, zone=f"z{n}") for n in range(count)))


def cpu_nodes(count: int, memory_gib: float = 48) -> Topology:
    return Topology(tuple(Node(f"cpu-{n}", 8, int(memory_gib * GIB)) for n in range(count)))


def deploy(
    topology: Topology, shape: ModelShape, *, context: int = 4096, replicas: int = 1, **sizes: int | ExpertLoads
) -> Deployment:
    request = PlanRequest(shape, Workload(context, 8), replicas, **sizes)  # type: ignore[arg-type]
    return deployment_of(topology, plan(topology, request), request.work)


def test_a_gang_on_one_node_is_one_pod_and_two_gangs_are_two() -> None:
    deployment = deploy(gpu_nodes(2), MIXTRAL, replicas=2)
    assert (deployment.data, deployment.tensor) == (4, 1)
    assert (deployment.min_replicas, deployment.max_replicas) == (4, 8)
    group = deployment.group
    assert (group.min_pods, group.max_pods, group.num_gpus, group.num_zones) == (1, 2, 4, 2)
    assert (group.accelerator, group.accelerator_gb) == ("A100-40G", 40)
    assert deployment.replica_cpus * 4 == group.cores == 40


def test_a_tensor_parallel_group_is_one_replica_that_asks_for_all_its_cards() -> None:
    deployment = deploy(gpu_nodes(1, cards=8, gigabytes=80), LLAMA)
    assert deployment.tensor > 1
    assert (deployment.min_replicas, deployment.max_replicas) == (1, 1)
    assert deployment.replica_memory == RUNTIME_BYTES * deployment.tensor
    assert deployment.replica_cpus == deployment.group.cores // (8 // deployment.tensor)


def test_a_dense_model_gets_replicas() -> None:
    deployment = deploy(gpu_nodes(2), MISTRAL, replicas=3)
    assert (deployment.data, deployment.min_replicas, deployment.max_replicas) == (1, 1, 3)
    assert deployment.source == "hf:mistralai/Mistral-7B-Instruct-v0.1"


def test_on_cpu_nodes_a_rank_asks_for_the_model_and_its_processes() -> None:
    deployment = deploy(cpu_nodes(4), MIXTRAL, data=4)
    rank = plan(cpu_nodes(4), PlanRequest(MIXTRAL, Workload(4096, 8), data=4)).replicas[0].ranks[0]
    assert deployment.replica_memory == rank.needs.total + RUNTIME_BYTES
    assert deployment.replica_memory <= deployment.group.memory_gib * GIB
    assert (deployment.group.min_pods, deployment.group.num_gpus) == (4, 0)


def test_memory_that_a_pod_does_not_have_is_refused_to_the_byte() -> None:
    enough = deploy(cpu_nodes(4), MIXTRAL, data=4).replica_memory
    made = plan(cpu_nodes(4), PlanRequest(MIXTRAL, Workload(4096, 8), data=4))
    smaller = cpu_nodes(4, 35)
    with pytest.raises(PlanError, match=f"needs {enough} bytes.*bytes short"):
        deployment_of(smaller, made, Workload(4096, 8))


def test_a_pipeline_is_refused() -> None:
    with pytest.raises(PlanError, match=r"4 pipeline stages.*--data"):
        deploy(cpu_nodes(4), MIXTRAL, context=8192, pipeline=4)


LOADS = ExpertLoads("mixtral-8x7b", ((9, 9, 1, 1, 1, 1, 1, 1),) * 32)


def engine_options_of(deployment: Deployment) -> dict[str, Any]:
    """As the pods' own configuration reads them."""
    (model,) = (app for app in serve_config(deployment)["applications"] if app["import_path"].endswith("build_model"))
    return ModelConfig(**model["args"]).engine_options


@pytest.mark.parametrize("copies", [0, 4])
def test_on_gpus_experts_by_measured_load_are_vllms_balancer_in_the_pods(copies: int) -> None:
    deployment = deploy(gpu_nodes(1, gigabytes=80), MIXTRAL, loads=LOADS, data=4, redundant_experts=copies)
    expected = {"enable_eplb": True, "eplb_config": {"num_redundant_experts": copies}}
    assert engine_options_of(deployment) == expected
    assert engine_options_of(deploy(gpu_nodes(1), MIXTRAL)) == {}


def test_on_cpu_nodes_experts_by_measured_load_are_in_the_section_that_pods_read() -> None:
    loads = ExpertLoads("mixtral-8x7b", ((9, 9, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 9, 9)) * 16)
    nodes = cpu_nodes(4)
    made = plan(nodes, PlanRequest(MIXTRAL, Workload(4096, 8), data=4, loads=loads))
    service = ray_service(deployment_of(nodes, made, Workload(4096, 8)))
    applications = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    section = ModelConfig(**next(app["args"] for app in applications if app["name"] == "llm-mixtral-8x7b"))
    assert section.expert_placement == "planned"
    assert section.expert_ranks is not None
    for layer, ranks in enumerate(section.expert_ranks):
        for rank, held in enumerate(made.replicas[0].ranks):
            assert {expert for expert, holder in enumerate(ranks) if holder == rank} == set(held.experts[layer])
    assert "  - [" in service["spec"]["serveConfigV2"]  # one line for each layer
    linear = deploy(nodes, MIXTRAL, data=4)
    assert (linear.expert_ranks, linear.num_redundant_experts) == (None, None)


def test_unlike_nodes_are_refused() -> None:
    topology = Topology((*gpu_nodes(1).nodes, replace(gpu_nodes(2).nodes[1], num_cores=32)))
    with pytest.raises(PlanError, match="unlike nodes"):
        deploy(topology, MIXTRAL, replicas=2)


def test_a_model_that_no_pod_could_fetch_is_refused() -> None:
    with pytest.raises(PlanError, match="No hub is known"):
        deploy(gpu_nodes(1), replace(MISTRAL, name="my-model"))
