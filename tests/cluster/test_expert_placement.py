"""Plans: what fits where, why, and clear words where nothing fits."""

from dataclasses import replace

import pytest

from cluster.errors import NoFit, PlanError
from cluster.expert_balance import busiest
from cluster.expert_placement import plan, plan_with_fitting_context
from cluster.plan import GPU_MEMORY_SHARE, ExpertLoads, PlanRequest
from cluster.sizing import ModelShape, Parallelism, Workload, rank_bytes
from cluster.topology import GB, GIB, Accelerator, Node, Topology

MIXTRAL = ModelShape("mixtral-8x7b", 32, 4096, 14336, 32, 8, 128, 32000, 32768, 8, 2)
MISTRAL = ModelShape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32000, 32768, sliding_window=4096)
LLAMA_70B = ModelShape("llama-2-70b", 80, 8192, 28672, 64, 8, 128, 32000, 4096)
SMALL = ModelShape("small", 30, 576, 1536, 12, 4, 64, 49152, 8192, 8, 2, tied_embeddings=True)
WORK = Workload(32768, 4, 8192)

A100 = Accelerator("A100-40G", 40 * GB)
H100 = Accelerator("H100", 80 * GB)


def gpu_nodes(card: Accelerator, per_node: int, *zones: str | None) -> Topology:
    return Topology(tuple(Node(f"n{i}", 64, 512 * GIB, (card,) * per_node, zone) for i, zone in enumerate(zones)))


def cpu_nodes(count: int, memory_gib: float = 32, cores: float = 8) -> Topology:
    return Topology(tuple(Node(f"n{i}", cores, int(memory_gib * GIB)) for i in range(count)))


def test_mixtral_on_four_40_gb_cards_gets_two_experts_per_rank() -> None:
    made = plan(gpu_nodes(A100, 4, None), PlanRequest(MIXTRAL, WORK))
    assert made.parallel == Parallelism(data=4, is_expert_parallel=True)
    assert [rank.experts[0] for rank in made.replicas[0].ranks] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert all(rank.free >= 0 for rank in made.replicas[0].ranks)


def test_gangs_stay_on_one_node_and_replicas_go_to_different_zones() -> None:
    made = plan(gpu_nodes(A100, 4, "a", "b"), PlanRequest(MIXTRAL, WORK, replicas=2))
    assert [replica.nodes for replica in made.replicas] == [("n0",), ("n1",)]


def zoned(nodes: Topology, *zones: str) -> Topology:
    return Topology(tuple(replace(node, zone=zone) for node, zone in zip(nodes.nodes, zones, strict=True)))


@pytest.mark.parametrize("nodes", [gpu_nodes(A100, 4, *[None] * 4), cpu_nodes(4)], ids=["gpu", "cpu"])
def test_a_second_replica_goes_to_the_other_zone_though_this_one_has_an_empty_node(nodes: Topology) -> None:
    shape = MIXTRAL if nodes.has_accelerators else SMALL
    made = plan(zoned(nodes, "a", "a", "b", "b"), PlanRequest(shape, Workload(2048, 4), replicas=3))
    assert [replica.nodes for replica in made.replicas] == [("n0",), ("n2",), ("n1",)]


def test_a_gang_over_nodes_stays_in_one_zone_and_the_next_takes_the_other() -> None:
    nodes = zoned(cpu_nodes(4), "a", "b", "a", "b")
    made = plan(nodes, PlanRequest(SMALL, Workload(2048, 8, 2048), data=2, replicas=2))
    assert [replica.nodes for replica in made.replicas] == [("n0", "n2"), ("n1", "n3")]


def test_replicas_of_a_dense_model_alternate_between_nodes() -> None:
    made = plan(gpu_nodes(A100, 4, "a", "b"), PlanRequest(MISTRAL, WORK, replicas=4))
    assert [replica.nodes[0] for replica in made.replicas] == ["n0", "n1", "n0", "n1"]
    assert made.free_slots == {"n0": 2, "n1": 2}


def test_all_ranks_of_a_tensor_parallel_group_are_on_one_node() -> None:
    made = plan(gpu_nodes(H100, 8, None, None), PlanRequest(LLAMA_70B, Workload(4096, 4, 4096), replicas=2))
    assert made.parallel.tensor == 4
    assert all(len(replica.nodes) == 1 for replica in made.replicas)


def test_cpu_gangs_go_over_the_nodes() -> None:
    made = plan(cpu_nodes(4), PlanRequest(SMALL, Workload(2048, 8, 2048), data=4))
    assert made.replicas[0].nodes == ("n0", "n1", "n2", "n3")


def test_a_gang_over_nodes_goes_where_the_network_is_fastest() -> None:
    links = (10.0, None, 100.0, 25.0)
    on_cpus = Topology(tuple(Node(f"n{i}", 8, 32 * GIB, link_gbit_s=link) for i, link in enumerate(links)))
    made = plan(on_cpus, PlanRequest(SMALL, Workload(2048, 8, 2048), data=2))
    assert made.replicas[0].nodes == ("n2", "n3")
    assert "exchange over the network: 25 Gbit/s at its slowest" in made.reasons[-1]
    on_gpus = Topology(tuple(Node(f"n{i}", 8, 32 * GIB, (H100,), None, link) for i, link in enumerate(links)))
    assert plan(on_gpus, PlanRequest(SMALL, Workload(2048, 8, 2048), data=2)).replicas[0].nodes == ("n2", "n3")
    one_node = plan(gpu_nodes(A100, 4, None), PlanRequest(MIXTRAL, WORK))
    assert "Gbit/s" not in " ".join(one_node.reasons)


def test_no_card_gets_more_than_its_share_and_one_byte_less_does_not_fit() -> None:
    need = rank_bytes(MISTRAL, Parallelism(), WORK).total
    card_bytes = next(
        size for size in range(int(need / GPU_MEMORY_SHARE) - 2, 10**12) if int(size * GPU_MEMORY_SHARE) >= need
    )
    request = PlanRequest(MISTRAL, WORK, tensor=1, pipeline=1)
    fits = plan(gpu_nodes(Accelerator("x", card_bytes), 1, None), request)
    assert fits.replicas[0].ranks[0].free == 0
    with pytest.raises(NoFit, match=r"1 bytes short|2 bytes short"):
        plan(gpu_nodes(Accelerator("x", card_bytes - 1), 1, None), request)


def test_what_does_not_fit_says_what_is_short_and_what_would_do() -> None:
    with pytest.raises(NoFit) as caught:
        plan(gpu_nodes(Accelerator("L4", 24 * GB), 1, None), PlanRequest(MIXTRAL, WORK))
    assert "bytes short" in str(caught.value)
    assert "quantized weights" in str(caught.value)


def test_a_model_that_only_a_pipeline_holds_does_not_fit_and_the_pipeline_is_named() -> None:
    with pytest.raises(NoFit) as caught:
        plan(cpu_nodes(4, 37), PlanRequest(MIXTRAL, Workload(8192, 8)))
    words = str(caught.value)
    assert "a shorter context (4096 tokens fit: 4 ranks hold 2 of 8 experts each)" in words
    assert "4 pipeline stages would hold it (--pipeline 4 shows them), but windfarm starts none." in words
    shown = plan(cpu_nodes(4, 37), PlanRequest(MIXTRAL, Workload(8192, 8), pipeline=4))
    assert shown.parallel == Parallelism(pipeline=4)
    assert "windfarm starts no pipelines" in " ".join(shown.reasons)


def test_where_no_context_was_asked_for_the_longest_that_fits_is_taken_and_said() -> None:
    request = PlanRequest(MIXTRAL, Workload(8192, 8))
    made, answered = plan_with_fitting_context(cpu_nodes(4, 37), request)
    assert made.parallel == Parallelism(data=4, is_expert_parallel=True)
    assert made.replicas[0].nodes == ("n0", "n1", "n2", "n3")
    assert answered.work == Workload(4096, 8)
    assert "8192 tokens per sequence do not fit, 4096 do" in made.reasons[-1]
    roomy, same = plan_with_fitting_context(cpu_nodes(4, memory_gib=64), request)
    assert (same, "do not fit" in " ".join(roomy.reasons)) == (request, False)
    with pytest.raises(NoFit, match="sequences of 8192 tokens"):
        plan_with_fitting_context(cpu_nodes(2, 37), request)


def test_quantized_weights_fit_where_the_full_ones_do_not() -> None:
    quantized = replace(LLAMA_70B, bytes_per_param=0.6)
    topology = gpu_nodes(H100, 1, None)
    with pytest.raises(NoFit):
        plan(topology, PlanRequest(LLAMA_70B, Workload(4096, 1, 2048)))
    assert plan(topology, PlanRequest(quantized, Workload(4096, 1, 2048))).parallel.num_ranks == 1


def test_measured_load_moves_experts_layer_by_layer() -> None:
    hot_first = (90, 80, 70, 60, 1, 1, 1, 1)
    loads = ExpertLoads("small", (hot_first, tuple(reversed(hot_first))) * 15)
    made = plan(cpu_nodes(2), PlanRequest(SMALL, Workload(2048, 8, 2048), data=2, loads=loads))
    for layer, tokens in enumerate(loads.tokens):
        partition = tuple(rank.experts[layer] for rank in made.replicas[0].ranks)
        assert busiest(tokens, partition) == 152
    assert "by measured load" in " ".join(made.reasons)


def test_redundant_experts_follow_the_load() -> None:
    loads = ExpertLoads("mixtral-8x7b", ((400, 10, 10, 10, 10, 10, 10, 10),) * 32)
    request = PlanRequest(MIXTRAL, Workload(8192, 2, 2048), data=4, loads=loads, redundant_experts=4)
    made = plan(gpu_nodes(H100, 4, None), request)
    assert all(0 in rank.experts[0] for rank in made.replicas[0].ranks)
    assert {len(rank.experts[0]) for rank in made.replicas[0].ranks} == {3}
    words = " ".join(made.reasons)
    assert "vLLM's own balancer (EPLB, 4 copies in each layer) assigns experts" in words
    assert "assigned by measured load" not in words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 16}, "16 ranks are more than the 8 experts"),
        ({"tensor": 3}, "do not divide the 32 attention heads"),
        (
            {"shape": SMALL, "work": Workload(512), "tensor": 3},
            "3 tensor-parallel ranks and the 4 key-value heads of small do not divide",
        ),
        ({"replicas": 0}, "At least one replica"),
        ({"tensor": -1}, "At least one tensor-parallel rank is needed, not -1"),
        ({"pipeline": 0}, "At least one pipeline stage"),
        ({"data": -4}, "At least one data-parallel rank"),
        ({"work": Workload(0)}, "At least one token of context"),
        ({"work": Workload(-1)}, "At least one token of context"),
        ({"work": Workload(512, -8)}, "At least one sequence is needed, not -8"),
        ({"work": Workload(512, 8, 0)}, "At least one token in a step"),
        ({"cores_per_rank": 0}, "a share of a core above 0, not 0"),
        ({"cores_per_rank": float("nan")}, "a share of a core above 0, not nan"),
        ({"redundant_experts": -1}, "cannot be -1 copies"),
        ({"pipeline": 2, "data": 2}, "has one pipeline stage"),
        ({"work": Workload(65536)}, "at most 32768 tokens"),
        ({"redundant_experts": 2}, "give a routing trace"),
        ({"loads": ExpertLoads("other", ())}, "of the model 'other'"),
        ({"loads": ExpertLoads("mixtral-8x7b", ((1, 2),))}, "1 layers of"),
        ({"shape": MISTRAL, "data": 2}, "dense: use replicas"),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(changes: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(gpu_nodes(A100, 4, None), replace(PlanRequest(MIXTRAL, WORK), **changes))
