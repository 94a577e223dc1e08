"""What cannot work with a model's ranks is an error before anything starts, with what is short to the byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.engines.parallelism import Parallelism
from cluster.errors import ClusterError, NoFit, PlanError
from cluster.expert_load import ExpertLoad
from cluster.home import Home, open_home
from cluster.plan import GPU_MEMORY_SHARE
from cluster.routing_trace import RoutingTrace, write_trace
from cluster.sizing import RankBytes
from cluster.topology import ACCELERATOR_MEMORY_LABEL, GB, Accelerator, Node, Topology
from cluster.weights.safetensors_header import fingerprint
from services import supervisor
from services.app import build_model
from services.cli import planning
from services.cli.commands import app
from services.config import ModelConfig
from services.environment import read_environment
from services.gang import GangSeat, Meeting
from services.local_network import loopback_seats
from services.model_server import parallelism_of
from services.node_layout import node_options, planned_topology
from services.placement_check import check_ranks
from services.plan_view import plan_data
from services.preflight import Machine, explain
from services.ray_config import parse_ray_config
from services.resources import GIB
from services.setup_errors import ConfigError, StartRefused
from services.sharding import num_gangs, plan_model, section_as_planned
from tests.services.mixtures import FILE, save_mixture, with_model


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.fixture
def mixture(tmp_path: Path) -> str:
    """A folder with a real, tiny Mixtral checkpoint."""
    return save_mixture(tmp_path / "mixture")


def model(source: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**({"id": "mixture", "source": source, "engine": "vllm", "data_parallel_size": 2} | changes))


def nodes(*memory: int, cores: float = 2) -> Topology:
    return Topology(tuple(Node(f"n{number}", cores, size) for number, size in enumerate(memory, 1)))


def needs(config: ModelConfig, home: Home) -> int:
    """Bytes that one rank asks for."""
    made, placement = plan_model(config, nodes(100 * GIB, 100 * GIB), home, 1)
    assert placement.rank.memory == made.replicas[0].ranks[0].needs.total
    return placement.rank.memory


@pytest.mark.requires("vllm")
def test_memory_that_is_short_by_one_byte_is_refused(mixture: str, home: Home) -> None:
    config = model(mixture)
    rank = needs(config, home)
    plan_model(config, nodes(2 * rank), home, 1)
    with pytest.raises(NoFit, match="the node n1 is 1 bytes short of memory"):
        plan_model(config, nodes(2 * rank - 1), home, 1)
    with pytest.raises(NoFit, match="1 bytes short"):
        plan_model(config, nodes(rank - 1, 0), home, 1)


@pytest.mark.requires("vllm")
def test_a_rank_gets_the_memory_that_its_engine_options_take(mixture: str, home: Home) -> None:
    def planned(**options: Any) -> RankBytes:
        made, _ = plan_model(model(mixture, engine_options=options), nodes(100 * GIB), home, 1)
        return made.replicas[0].ranks[0].needs

    assert planned(dtype="float32").kv_cache == 2 * planned().kv_cache
    assert planned(max_num_batched_tokens=512).activations < planned().activations


@pytest.mark.requires("vllm")
def test_too_few_cores_are_refused(mixture: str, home: Home) -> None:
    with pytest.raises(NoFit, match=r"2 ranks of 0\.3 cores each, the nodes have 0\.5 cores"):
        plan_model(model(mixture), nodes(100 * GIB, cores=0.5), home, 1)


@pytest.mark.requires("vllm")
def test_several_gangs_need_room_for_all_their_ranks(mixture: str, home: Home) -> None:
    rank = needs(model(mixture), home)
    made, placement = plan_model(model(mixture), nodes(2 * rank, 2 * rank), home, 2)
    assert placement.num_gangs == 2
    assert [replica.nodes for replica in made.replicas] == [("n1", "n2"), ("n1", "n2")]
    with pytest.raises(NoFit, match="room for 1 of 2 replicas"):
        plan_model(model(mixture), nodes(2 * rank, rank), home, 2)


@pytest.mark.requires("vllm")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_parallel_size": 16}, "16 ranks are more than the 8 experts"),
        ({"data_parallel_size": 1, "tensor_parallel_size": 5}, "5 tensor-parallel ranks do not divide the 12 "),
        ({"memory_gib": 0.5}, "bytes short of the"),
        ({"max_context": 4096}, "at most 512 tokens"),
    ],
)
def test_sizes_that_the_model_cannot_have_are_refused(
    mixture: str, home: Home, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_model(model(mixture, **changes), nodes(100 * GIB, 100 * GIB, cores=64), home, 1)


@pytest.mark.requires("vllm")
def test_a_dense_model_gets_replicas_and_no_gang(home: Home, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(PlanError, match="is dense: use replicas"):
        plan_model(model(str(tmp_path / "dense")), nodes(100 * GIB), home, 1)


def test_only_vllm_cuts_models_into_ranks(home: Home) -> None:
    with pytest.raises(PlanError, match="only vLLM can cut a model into ranks, not llamacpp"):
        plan_model(model("tiny", engine="llamacpp"), nodes(100 * GIB), home, 1)


@pytest.mark.requires("vllm")
def test_a_damaged_trace_is_refused(mixture: str, home: Home, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"format": "something else"}), encoding="utf-8")
    config = model(mixture, expert_placement="planned", expert_trace=str(trace))
    with pytest.raises(ClusterError, match=r"trace\.json"):
        plan_model(config, nodes(100 * GIB), home, 1)


@pytest.mark.requires("vllm")
def test_experts_are_placed_by_a_saved_plan_or_left_to_the_engine(mixture: str, home: Home, tmp_path: Path) -> None:
    there = nodes(100 * GIB, 100 * GIB)
    made, linear = plan_model(model(mixture), there, home, 1)
    assert linear.expert_ranks is None
    data = plan_data(made)
    for layer in range(2):  # any other placement than the linear one
        data["replicas"][0]["ranks"][0]["experts"][layer] = [0, 2, 4, 6]
        data["replicas"][0]["ranks"][1]["experts"][layer] = [1, 3, 5, 7]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    _, planned = plan_model(model(mixture, expert_placement="planned", plan=str(file)), there, home, 1)
    assert planned.expert_ranks == ((0, 1) * 4,) * 2
    assert planned.nodes == ("n1", "n2")
    with pytest.raises(PlanError, match="puts ranks on n2, which is not in the cluster"):
        plan_model(model(mixture, plan=str(file)), nodes(100 * GIB), home, 1)


@pytest.mark.requires("vllm")
def test_experts_are_placed_as_the_section_itself_says(mixture: str, home: Home) -> None:
    there = nodes(100 * GIB, 100 * GIB)
    ranks = ((0, 1) * 4, (1, 0) * 4)
    written = model(mixture, expert_placement="planned", expert_ranks=ranks)
    assert plan_model(written, there, home, 1)[1].expert_ranks == ranks
    with pytest.raises(PlanError, match="1 layers, the model 2"):
        plan_model(written.model_copy(update={"expert_ranks": ranks[:1]}), there, home, 1)
    with pytest.raises(PlanError, match="does not give each rank 4 experts"):
        plan_model(written.model_copy(update={"expert_ranks": ((0,) * 8,) * 2}), there, home, 1)
    with pytest.raises(PlanError, match="expert_ranks of mixture are for CPU nodes"):
        plan_model(written, with_cards(2), home, 1)


def load_of(chosen: list[dict[tuple[int, int], int]]) -> ExpertLoad:
    """Counts of tokens that chose these pairs of the 8 experts, layer by layer."""
    pairs = np.zeros((len(chosen), 8, 8), np.int64)
    for layer, choices in enumerate(chosen):
        for (first, second), count in choices.items():
            for one, other in ((first, first), (second, second), (first, second), (second, first)):
                pairs[layer, one, other] += count
    tokens = np.einsum("lee->le", pairs).copy()
    return ExpertLoad(tokens, pairs, np.zeros_like(tokens), 1, 2, 0.0, 1.0)


@pytest.mark.requires("vllm")
def test_experts_are_placed_by_the_load_of_a_trace(mixture: str, home: Home, tmp_path: Path) -> None:
    # Two tokens of three choose 0 and 1 in the first layer, 6 and 7 in the second.
    load = load_of([{(0, 1): 70, (2, 3): 12, (4, 5): 12, (6, 7): 12}, {(6, 7): 70, (0, 1): 12, (2, 3): 12, (4, 5): 12}])
    trace = tmp_path / "trace.json"
    config = model(mixture, expert_placement="planned", expert_trace=str(trace))
    with pytest.raises(ClusterError, match="cannot be read"):
        plan_model(config, nodes(100 * GIB), home, 1)
    write_trace(trace, RoutingTrace("mixture", fingerprint(Path(mixture)), load))
    _, placement = plan_model(config, nodes(100 * GIB), home, 1)
    assert placement.expert_ranks is not None
    for layer, busiest in enumerate(((0, 1), (6, 7))):
        ranks = placement.expert_ranks[layer]
        assert ranks[busiest[0]] != ranks[busiest[1]]  # the two that have most to do are apart


@pytest.mark.requires("vllm")
def test_planned_experts_go_from_the_section_to_the_engine_of_each_rank(
    mixture: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_of([{(0, 1): 70, (2, 3): 12, (4, 5): 12, (6, 7): 12}, {(6, 7): 70, (0, 1): 12, (2, 3): 12, (4, 5): 12}])
    trace = tmp_path / "trace.json"
    write_trace(trace, RoutingTrace("mixture", fingerprint(Path(mixture)), load))
    config = model(mixture, expert_placement="planned", expert_trace=str(trace))
    _, placement = plan_model(config, nodes(100 * GIB, 100 * GIB), home, 1)
    assert placement.expert_ranks not in (None, Parallelism(2, enable_expert_parallel=True).expert_ranks(2, 8))

    resources = {"CPU": 2.0, "memory": 100.0 * GIB}
    records = [{"NodeID": f"{n}", "NodeName": f"n{n}", "Alive": True, "Resources": resources} for n in (1, 2)]
    monkeypatch.setattr("ray.nodes", lambda: records)
    monkeypatch.setenv("WINDFARM_HOME", str(home.root))
    section, expert_ranks = build_model(config)._bound_deployment.init_args
    assert (section, expert_ranks) == (config, placement.expert_ranks)

    environment = read_environment({"WINDFARM_HOME": str(home.root), "WINDFARM_INTERNAL_SECRET": "secret"})
    meeting = Meeting("198.18.0.1", 4000, ("198.18.0.1", "198.18.0.2"))
    for rank in (0, 1):
        assert parallelism_of(section, environment, expert_ranks, GangSeat("gang", rank, 2), meeting) == Parallelism(
            data_parallel_size=2,
            data_parallel_rank=rank,
            data_parallel_address="198.18.0.1",
            data_parallel_rpc_port=4000,
            enable_expert_parallel=True,
            expert_placement=expert_ranks,
            count_experts=True,
        )


def with_cards(number: int) -> Topology:
    return Topology((Node("gpu", 64, 512 * GIB, (Accelerator("H100", 80 * GB),) * number),))


@pytest.mark.requires("vllm")
def test_on_gpus_a_plan_with_copies_becomes_vllms_balancer(mixture: str, home: Home, tmp_path: Path) -> None:
    load = load_of([{(0, 1): 70, (2, 3): 12, (4, 5): 12, (6, 7): 12}] * 2)
    trace, file = tmp_path / "trace.json", tmp_path / "plan.json"
    write_trace(trace, RoutingTrace("mixture", fingerprint(Path(mixture)), load))
    by_trace = model(mixture, data_parallel_size=4, expert_placement="planned", expert_trace=str(trace))
    copies = {"enable_eplb": True, "eplb_config": {"num_redundant_experts": 4}}
    made, placement = plan_model(by_trace.model_copy(update={"engine_options": copies}), with_cards(4), home, 1)
    assert {len(rank.experts[0]) for rank in made.replicas[0].ranks} == {3}
    assert placement.expert_ranks is None
    file.write_text(json.dumps(plan_data(made)), encoding="utf-8")

    by_plan = model(mixture, data_parallel_size=4, expert_placement="planned", plan=str(file))
    _, placement = plan_model(by_plan, with_cards(4), home, 1)
    assert (placement.num_redundant_experts, placement.expert_ranks) == (4, None)
    assert section_as_planned(by_plan, placement).engine_options == copies
    _, placement = plan_model(by_trace, with_cards(4), home, 1)
    balanced = {"enable_eplb": True, "eplb_config": {"num_redundant_experts": 0}}
    assert section_as_planned(by_trace, placement).engine_options == balanced
    linear = model(mixture, data_parallel_size=4)
    assert section_as_planned(linear, plan_model(linear, with_cards(4), home, 1)[1]) == linear

    with pytest.raises(PlanError, match="Redundant experts need GPUs"):
        plan_model(by_plan, nodes(*[100 * GIB] * 4), home, 1)
    off = by_plan.model_copy(update={"engine_options": {"enable_eplb": False}})
    with pytest.raises(PlanError, match="set expert_placement: linear"):
        plan_model(off, with_cards(4), home, 1)


def test_replicas_of_a_gang_come_in_whole_gangs() -> None:
    assert num_gangs(model("small"), None) == 1
    assert num_gangs(model("small"), 4) == 2
    with pytest.raises(PlanError, match="Use a multiple of 2"):
        num_gangs(model("small"), 3)


@pytest.mark.parametrize(
    ("arguments", "deployments", "message"),
    [
        ("data_parallel_size: 2", ", deployments: [{name: ModelServer, num_replicas: 3}]", "3 is no multiple of 2"),
        ("data_parallel_size: 2, engine: llamacpp", "", "only vLLM can cut a model into 2 ranks"),
        ("data_parallel_size: 2, expert_placement: planned", "", "needs `expert_trace`"),
        ("data_parallel_size: 2, expert_ranks: [[0, 1]]", "", "goes with `expert_placement: planned`"),
        (
            "data_parallel_size: 2, expert_placement: planned, plan: p.json, expert_ranks: [[0, 1]]",
            "",
            "without `expert_trace` and `plan`",
        ),
        ("data_parallel_size: 0", "", "greater than or equal to 1"),
        (
            "data_parallel_size: 2",
            ", deployments: [{name: ModelServer, placement_group_strategy: SPREAD}]",
            "a gang is placed as a whole",
        ),
    ],
)
def test_the_file_is_refused_where_its_ranks_contradict_themselves(
    arguments: str, deployments: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_ray_config(with_model(arguments, deployments), FILE)


def test_the_line_that_turns_small_on_is_in_the_file() -> None:
    text = FILE.read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("  # - {name: llm-small"))
    config = parse_ray_config(text.replace(line, line.replace("# - ", "- ")), FILE)
    assert config.app.models["small"].data_parallel_size == 2


@pytest.mark.requires("vllm")
def test_up_refuses_ranks_that_do_not_fit_its_nodes(mixture: str, home: Home) -> None:
    config = parse_ray_config(with_model(f"source: '{mixture}', engine: vllm, data_parallel_size: 2"), FILE)
    with pytest.raises(StartRefused, match=r"ranks of mixture: .* does not fit"):
        supervisor.refuse_unless_planned(config, home, nodes(GIB))
    assert explain(list(check_ranks(config, home, nodes(100 * GIB)))) == ""


@pytest.mark.requires("vllm")
def test_windfarm_plan_and_the_start_agree_to_the_byte_and_the_core(
    mixture: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model(mixture, parallel_requests=6)  # three sequences are reserved on each of two ranks
    rank = needs(config, home)
    asked = ["plan", mixture, "--data", "2", "--context", "512", "--sequences", "6", "--json"]
    for there, fits in [
        (nodes(2 * rank), True),
        (nodes(2 * rank - 1), False),
        (nodes(rank, rank, cores=0.3), True),
        (nodes(rank, rank, cores=0.29), False),
    ]:
        monkeypatch.setattr(planning, "_running_nodes", lambda there=there: there)
        answer = CliRunner().invoke(app, asked, env={"WINDFARM_HOME": str(home.root)})
        if fits:
            made, _ = plan_model(config, there, home, 1)
            assert json.loads(answer.stdout)["replicas"] == json.loads(json.dumps(plan_data(made)["replicas"]))
            continue
        with pytest.raises(NoFit) as caught:
            plan_model(config, there, home, 1)
        assert str(answer.exception) == str(caught.value)


def machine_with_cards(tmp_path: Path, number: int, card_bytes: int) -> Topology:
    """As `windfarm up` plans for it: cards whose memory the head's label says."""
    machine = Machine(num_cpus=8, num_gpus=number, total_memory=64 * GIB, free_memory=64 * GIB)
    labels = {ACCELERATOR_MEMORY_LABEL: str(card_bytes / GB)}
    return planned_topology(node_options(machine, tmp_path, loopback_seats(1), labels))


@pytest.mark.requires("vllm")
def test_up_plans_ranks_on_the_machines_cards_and_refuses_what_they_cannot_hold(
    mixture: str, home: Home, tmp_path: Path
) -> None:
    config = parse_ray_config(with_model(f"source: '{mixture}', engine: vllm, data_parallel_size: 2"), FILE)
    made, _ = plan_model(config.app.models["mixture"], machine_with_cards(tmp_path, 2, 80 * GB), home, 1)
    assert [rank.accelerator for rank in made.replicas[0].ranks] == [0, 1]
    need = made.replicas[0].ranks[0].needs.total
    least = next(size for size in range(need, 2 * need) if int(size * GPU_MEMORY_SHARE) >= need)
    supervisor.refuse_unless_planned(config, home, machine_with_cards(tmp_path, 2, least))
    with pytest.raises(StartRefused, match=r"offers .* 1 bytes short"):
        supervisor.refuse_unless_planned(config, home, machine_with_cards(tmp_path, 2, least - 1))
    with pytest.raises(StartRefused, match=r"ranks of mixture: .* does not fit"):
        supervisor.refuse_unless_planned(config, home, machine_with_cards(tmp_path, 1, 80 * GB))


@pytest.mark.requires("vllm")
def test_a_card_is_filled_as_far_as_vllm_is_told_to(mixture: str, home: Home) -> None:
    def planned(share: object) -> None:
        plan_model(model(mixture, engine_options={"gpu_memory_utilization": share}), cards_of(least), home, 1)

    made, _ = plan_model(model(mixture), with_cards(2), home, 1)
    need = made.replicas[0].ranks[0].needs.total
    least = next(size for size in range(2 * need - 2, 2 * need + 2) if int(size * 0.5) >= need)
    planned(0.5)
    planned(GPU_MEMORY_SHARE)
    with pytest.raises(NoFit, match="offers"):
        planned(0.49)
    least -= 1
    with pytest.raises(NoFit, match="1 bytes short"):
        planned(0.5)
    for wrong in (0, 1.5, True, "half"):
        with pytest.raises(PlanError, match="a share above 0 and up to 1"):
            planned(wrong)


def cards_of(card_bytes: int) -> Topology:
    return Topology((Node("gpu", 64, 512 * GIB, (Accelerator("other", card_bytes),) * 2),))


@pytest.mark.requires("vllm")
@pytest.mark.parametrize("changes", [{"engine_options": {"enable_eplb": True}}, {"expert_placement": "planned"}])
def test_a_kind_whose_experts_vllm_cannot_balance_is_refused(
    mixture: str, home: Home, tmp_path: Path, changes: dict[str, Any]
) -> None:
    trace = tmp_path / "trace.json"
    write_trace(trace, RoutingTrace("mixture", fingerprint(Path(mixture)), load_of([{(0, 1): 1}] * 2)))
    config = model(mixture, **changes, **({"expert_trace": str(trace)} if "expert_placement" in changes else {}))
    plan_model(config, with_cards(2), home, 1)
    file = Path(mixture) / "config.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("MixtralForCausalLM", "PhiMoEForCausalLM"), encoding="utf-8")
    plan_model(model(mixture), with_cards(2), home, 1)
    with pytest.raises(PlanError, match="does not know models of the kind PhiMoEForCausalLM, as mixture is"):
        plan_model(config, with_cards(2), home, 1)


@pytest.mark.requires("vllm")
def test_up_allows_copies_of_experts_where_there_are_cards(mixture: str, home: Home, tmp_path: Path) -> None:
    copies = "engine_options: {enable_eplb: true, eplb_config: {num_redundant_experts: 4}}"
    text = with_model(f"source: '{mixture}', engine: vllm, data_parallel_size: 4, {copies}")
    config = parse_ray_config(text, FILE)
    supervisor.refuse_unless_planned(config, home, machine_with_cards(tmp_path, 4, 80 * GB))
    with pytest.raises(StartRefused, match="Redundant experts need GPUs"):
        supervisor.refuse_unless_planned(config, home, machine_with_cards(tmp_path, 0, 80 * GB))


def test_trace_and_plan_beside_the_file_are_found_from_every_folder(tmp_path: Path) -> None:
    arguments = "data_parallel_size: 2, expert_placement: planned, expert_trace: trace.json, plan: ./plan.json"
    found = parse_ray_config(with_model(arguments), tmp_path / "ray_config.yaml").app.models["mixture"]
    assert found.expert_trace == str(tmp_path / "trace.json")
    assert found.plan == str(tmp_path / "plan.json")
