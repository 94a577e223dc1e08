"""Several nodes on one machine: where they run, what each offers, and what processes are told of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from services import node_layout
from services.environment import read_environment
from services.local_network import loopback_seats, namespace_seats
from services.node_layout import (
    choose_seats,
    head_labels,
    node_options,
    node_variables,
    planned_topology,
    running_topology,
)
from services.preflight import OBJECT_STORE_BYTES, OVERHEAD_BYTES, Machine
from services.ray_config import load_ray_config, parse_ray_config
from services.ray_status import summarize
from services.resources import GIB, HEAD_MARK
from services.setup_errors import StartRefused
from services.up_options import UpOptions

FILE = Path(__file__).resolve().parents[2] / "ray_config.yaml"
LAPTOP = Machine(num_cpus=2, num_gpus=0, total_memory=24 * GIB, free_memory=20 * GIB)


def options(tmp_path: Path, **changes) -> UpOptions:
    return UpOptions(tmp_path, load_ray_config(FILE), port=8000, **({"num_local_nodes": 3} | changes))


def test_one_node_is_on_loopback_and_nothing_else_is_told(tmp_path: Path) -> None:
    alone = options(tmp_path, num_local_nodes=1)
    seats = choose_seats(alone, "tag", print)
    (node,) = node_options(LAPTOP, tmp_path, seats)
    assert (node.node_ip, node.num_cpus) == ("127.0.0.1", 2)
    assert node_variables(seats, [node], 8000, alone) == {}


def test_nodes_share_cores_and_memory(tmp_path: Path) -> None:
    seats = choose_seats(options(tmp_path, use_namespaces=False), "tag", print)
    nodes = node_options(LAPTOP, tmp_path, seats)
    assert [node.node_ip for node in nodes] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    assert [node.num_cpus for node in nodes] == [1, 1, 1]
    given = sum(node.memory_bytes + node.object_store_bytes for node in nodes) + OVERHEAD_BYTES
    assert LAPTOP.free_memory - 3 <= given <= LAPTOP.free_memory
    assert nodes[0].object_store_bytes == OBJECT_STORE_BYTES


def test_processes_of_a_node_in_a_namespace_know_its_address_and_the_way_out(tmp_path: Path) -> None:
    seats = namespace_seats("0123456789abcdef", 3)
    assert [seat.address for seat in seats] == ["198.18.0.1", "198.18.0.2", "198.18.0.3"]
    assert seats[1].command(["true"]) == ["ip", "netns", "exec", "wf-01234567-2", "true"]
    nodes = node_options(LAPTOP, tmp_path, seats)
    told = node_variables(seats, nodes, 8000, options(tmp_path))
    given = {**told, "WINDFARM_INTERNAL_SECRET": 40 * "s", "WINDFARM_HOME": str(tmp_path), "WINDFARM_GUARDIAN": "77"}
    environment = read_environment(given)
    assert environment.internal_host == "198.18.0.1"
    assert environment.public_namespace == Path("/proc/77/ns/net")
    assert environment.public_url == "http://127.0.0.1:8000"
    assert environment.threads == 1


def test_threads_that_the_operator_named_stay(tmp_path: Path) -> None:
    seats = namespace_seats("0123456789abcdef", 3)
    nodes = node_options(LAPTOP, tmp_path, seats)
    assert "WINDFARM_THREADS" not in node_variables(seats, nodes, 8000, options(tmp_path, threads=2))


def test_where_namespaces_cannot_be_made_the_nodes_are_on_loopback_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_layout, "why_no_network", lambda: "only root may make network namespaces")
    said: list[str] = []
    seats = choose_seats(options(tmp_path), "tag", said.append)
    assert [seat.namespace for seat in seats] == [None, None, None]
    assert "only root may make network namespaces" in said[0]
    with pytest.raises(StartRefused, match="only root may"):
        choose_seats(options(tmp_path, use_namespaces=True), "tag", said.append)


def test_what_needs_the_outside_gets_no_network_that_leads_nowhere(tmp_path: Path) -> None:
    remote = (
        "  - {name: llm-far, route_prefix: null, import_path: 'services.app:build_model', "
        "args: {id: far, source: 'https://models.example/v1'}}\n"
    )
    text = FILE.read_text(encoding="utf-8").replace("applications:\n", f"applications:\n{remote}", 1)
    wanted = UpOptions(tmp_path, parse_ray_config(text, FILE), num_local_nodes=2)
    said: list[str] = []
    assert choose_seats(wanted, "tag", said.append)[1].address == "127.0.0.2"
    assert "the model far is a remote API" in said[0]


def test_the_nodes_of_a_running_windfarm_can_be_planned_for() -> None:
    node = {"name": "a", "labels": {}, "alive": True, "CPU": 2.0, "GPU": 0.0, "memory": 8.0 * GIB}
    topology = running_topology({"nodes": [node, {**node, "name": "b", "alive": False}]})
    assert [(found.name, found.num_cores, found.memory_bytes) for found in topology.nodes] == [("a", 2.0, 8 * GIB)]
    head = summarize({}, [{"NodeName": "b", "Alive": True, "Resources": {HEAD_MARK: 1.0}}], {})["nodes"]
    assert [found.name for found in running_topology({"nodes": [node, *head]}).nodes] == ["b", "a"]


def test_the_head_tells_the_memory_of_its_smallest_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards = replace(LAPTOP, num_gpus=2)
    said: list[str] = []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert head_labels(with_cards, {"zone": "a"}, said.append) == {"zone": "a"}
    assert "The memory of this machine's 2 GPUs cannot be read" in said[0]
    assert "--label windfarm/accelerator-memory-gb=<GB>" in said[0]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 80000, GPU-a1'\necho 'NVIDIA L4, 24000, GPU-b2'\n")
    tool.chmod(0o755)
    labels = head_labels(with_cards, {"zone": "a"}, said.append)
    head, other = node_options(with_cards, tmp_path, loopback_seats(2), labels)
    assert (head.labels["zone"], other.labels) == ("a", {})
    planned = planned_topology([head, other])
    assert [card.memory_bytes for card in planned.nodes[0].accelerators] == [24000 * 2**20] * 2
    assert (planned.nodes[0].zone, planned.nodes[1].accelerators) == ("a", ())


def test_the_operators_word_on_the_cards_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    given = {"windfarm/accelerator-memory-gb": "96"}
    (head,) = node_options(
        replace(LAPTOP, num_gpus=1), tmp_path, loopback_seats(1), head_labels(replace(LAPTOP, num_gpus=1), given, print)
    )
    assert planned_topology([head]).nodes[0].accelerators[0].memory_bytes == 96 * 10**9
