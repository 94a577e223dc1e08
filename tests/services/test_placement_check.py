"""All that the file asks for must have room at once; what has none is an error before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.engines.choice import Hardware
from cluster.home import Home, open_home
from cluster.topology import ACCELERATOR_MEMORY_LABEL, Node, Topology
from services import resources, rolling, sharding, supervisor
from services.code_copies import read_sources
from services.local_network import loopback_seats
from services.node_layout import node_options, planned_topology
from services.placement_check import check_ranks
from services.preflight import OBJECT_STORE_BYTES, OVERHEAD_BYTES, Machine, demands, explain
from services.ray_config import RayConfig, parse_ray_config
from services.resources import GIB
from services.setup_errors import StartRefused
from services.sharding import plan_model
from tests.services.mixtures import FILE, line_of, save_mixture, with_model

MISTRAL_7B = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}


class Submitted(Exception):
    """The configuration has passed all checks."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.fixture
def mixture(tmp_path: Path) -> str:
    return save_mixture(tmp_path / "mixture")


def mixtures(source: str, *names: str) -> RayConfig:
    lines = "".join(line_of(name, f"source: '{source}', engine: vllm, data_parallel_size: 2") for name in names)
    text = FILE.read_text(encoding="utf-8").replace("  - name: llm-tiny", f"{lines}  - name: llm-tiny", 1)
    return parse_ray_config(text, FILE)


def bytes_of(config: RayConfig, home: Home) -> int:
    """What the replicas and ranks of everything reserve."""
    total = 0
    for demand in demands(config, home.root):
        model = config.app.models.get(demand.application.removeprefix("llm-"))
        memory = demand.each.memory
        if model is not None and model.num_ranks > 1:
            memory = plan_model(model, Topology((Node("n", 64, 512 * GIB),)), home, 1)[1].rank.memory
        total += demand.replicas * memory
    return total


def by_up(config: RayConfig, home: Home, memory: int, folder: Path, _: pytest.MonkeyPatch) -> None:
    free = memory + OVERHEAD_BYTES + OBJECT_STORE_BYTES
    nodes = node_options(Machine(4, 0, free, free), folder, loopback_seats(1))
    supervisor.plan_where_needed(config, home, lambda: planned_topology(nodes))
    raise Submitted


def by_apply(config: RayConfig, home: Home, memory: int, _: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"name": "n", "labels": {}, "alive": True, "is_head": True, "CPU": 4.0, "GPU": 0.0, "memory": float(memory)}

    def ask(_: object, message: dict[str, Any], **more: object) -> dict[str, Any]:
        if message["do"] == "apply":
            raise Submitted
        return {"nodes": [node], "config": {"applications": []}}

    state = SimpleNamespace(control="", may_use_hub=False, code=read_sources().version)
    monkeypatch.setattr(rolling, "running_state", lambda _: state)
    monkeypatch.setattr(rolling, "refuse_what_cannot_roll", lambda *_: None)
    monkeypatch.setattr(rolling, "ask", ask)
    rolling.apply(home.root, config, print, lambda _: None, 1.0, lambda *_: None)


@pytest.mark.requires("vllm")
@pytest.mark.parametrize("start", [by_up, by_apply])
def test_two_mixtures_that_fit_only_singly_are_refused(
    start: Callable[..., None], mixture: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = mixtures(mixture, "one", "two")
    enough = bytes_of(both, home)
    with pytest.raises(Submitted):
        start(both, home, enough, tmp_path, monkeypatch)
    for alone in ("one", "two"):
        with pytest.raises(Submitted):
            start(mixtures(mixture, alone), home, enough - 1, tmp_path, monkeypatch)
    with pytest.raises(StartRefused) as refused:
        start(both, home, enough - 1, tmp_path, monkeypatch)
    assert "ranks of two: mixture does not fit" in str(refused.value)
    assert "is 1 bytes short of memory" in str(refused.value)
    assert "llm-one/ModelServer leave of the nodes" in str(refused.value)


@pytest.mark.requires("vllm")
def test_ranks_go_to_the_nodes_that_the_rest_leaves(mixture: str, home: Home) -> None:
    """The head holds what belongs there, a node the ranks, and each of the others one replica."""
    config = mixtures(mixture, "one")
    rank = plan_model(config.app.models["one"], Topology((Node("n", 9, 512 * GIB),)), home, 1)[1].rank.memory
    others = {f"{d.application}/{d.deployment}": d.each for d in demands(config, home.root) if d.replicas == 1}
    on_head = [each for each in others.values() if each.is_on_head]
    free = [each for each in others.values() if not each.is_on_head]
    head = Node("head", sum(each.num_cpus for each in on_head), sum(each.memory for each in on_head))
    rest = [Node(f"rest-{number}", each.num_cpus, each.memory) for number, each in enumerate(free)]
    two = Node("two", 0.6, 2 * rank)

    def failed(*nodes: Node) -> str:
        return explain(check_ranks(config, home, Topology(nodes)))

    assert failed(head, two, *rest) == ""
    assert "ranks of one" in failed(head, Node("two", 0.6, 2 * rank - 1), *rest)
    assert "ranks of one" in failed(head, Node("two", 0.59, 2 * rank), *rest)
    assert "embed/Embedding" in failed(head, two, *(node for node in rest if node.num_cores != 0.3))
    assert "room for store/Store" in failed(Node("none", 0.0, 0), head, two, *rest)


@pytest.mark.requires("vllm")
def test_what_a_rank_is_given_by_hand_needs_room_too(mixture: str, home: Home) -> None:
    def failed(gib: int) -> str:
        options = f"ray_actor_options: {{num_cpus: 0.3, memory: {gib * GIB}}}"
        text = with_model(
            f"source: '{mixture}', engine: vllm, data_parallel_size: 2",
            f", deployments: [{{name: ModelServer, {options}}}]",
        )
        return explain(check_ranks(parse_ray_config(text, FILE), home, Topology((Node("n", 8, 40 * GIB),))))

    assert failed(10) == ""
    assert "1 ranks find no node that has 0.3 CPUs and 30.0 GiB left" in failed(30)


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (resources, sharding):
        monkeypatch.setattr(module, "detect_hardware", lambda: Hardware(has_gpu=True, has_vllm=True))


@pytest.mark.usefixtures("on_gpus")
@pytest.mark.parametrize(
    ("changes", "gigabytes", "is_refused"),
    [
        ("", 8, True),
        ("", 24, False),
        (", engine_options: {gpu_memory_utilization: 0.5}", 24, True),
        (", engine_options: {quantization: fp8}", 8, False),
        ("", None, False),
    ],
)
def test_a_model_on_a_gpu_that_cannot_hold_it_is_refused_where_the_gpus_memory_is_known(
    changes: str, gigabytes: int | None, is_refused: bool, home: Home, tmp_path: Path
) -> None:
    folder = tmp_path / "mistral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(14_500_000_000)
    config = parse_ray_config(with_model(f"source: '{folder}'{changes}", name="big"), FILE)
    labels = {} if gigabytes is None else {ACCELERATOR_MEMORY_LABEL: str(gigabytes)}
    nodes = node_options(Machine(8, 2, 64 * GIB, 64 * GIB), tmp_path, loopback_seats(1), labels)
    if not is_refused:
        supervisor.plan_where_needed(config, home, lambda: planned_topology(nodes))
        return
    with pytest.raises(StartRefused, match=r"GPU for big: mistral does not fit \(one replica, 1 sequences of 32768"):
        supervisor.plan_where_needed(config, home, lambda: planned_topology(nodes))


def test_a_machine_without_gpus_and_ranks_is_not_planned(home: Home) -> None:
    config = parse_ray_config(FILE.read_text(encoding="utf-8"), FILE)
    tiny_node = Topology((Node("n", 0.1, 1),))
    supervisor.plan_where_needed(config, home, lambda: tiny_node)
