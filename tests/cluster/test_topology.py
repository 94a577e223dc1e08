"""Nodes from Ray's records and from files, with bad files refused."""

from pathlib import Path

import pytest

from cluster.errors import TopologyError
from cluster.topology import GB, GIB, Accelerator, Node, Topology, read_topology, topology_from_ray


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "nodes.yaml"
    path.write_text(text)
    return path


def test_a_count_makes_numbered_nodes(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "nodes:\n- {name: gpu, count: 2, cores: 64, memory_gib: 512, zone: a, link_gbit_s: 100,"
        " accelerators: {kind: A100-40G, count: 4}}\n- {name: cpu, cores: 8, memory_gib: 32}\n",
    )
    nodes = read_topology(path).nodes
    assert [node.name for node in nodes] == ["gpu-1", "gpu-2", "cpu"]
    assert nodes[0].accelerators == (Accelerator("A100-40G", 40 * GB),) * 4
    assert nodes[2] == Node("cpu", 8, 32 * GIB)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: []", "names no nodes"),
        ("machines: []", "names no nodes"),
        ("nodes:\n- {name: a, cores: 1, memory_gib: 1, gpus: 4}", "unknown key 'gpus'"),
        ("nodes:\n- {name: a, memory_gib: 1}", "cores must be a number"),
        ("nodes:\n- {name: a, cores: 1, memory_gib: -1}", "memory_gib must be a number"),
        ("nodes:\n- {name: a, cores: .nan, memory_gib: 1}", "cores must be a number"),
        ("nodes:\n- {name: a, cores: .inf, memory_gib: 1}", "cores must be a number"),
        (
            "nodes:\n- {name: a, cores: 1, memory_gib: 1, accelerators: {kind: L4, memory_gb: 80GB}}",
            r"nodes\[0\]\.accelerators: memory_gb is '80GB'; it is a number above 0",
        ),
        ("nodes:\n- {name: a, cores: 1, memory_gib: 1, accelerators: {kind: Z9}}", "memory of accelerator type 'Z9'"),
        ("nodes:\n- {name: a, cores: 1, memory_gib: 1}\n- {name: a, cores: 1, memory_gib: 1}", "must be unique"),
        ("nodes: [", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        read_topology(write(tmp_path, text))


def test_rays_records_become_nodes_and_dead_ones_are_left_out() -> None:
    records = [
        {
            "NodeID": "1",
            "Alive": True,
            "NodeName": "n1",
            "Resources": {"CPU": 2.0, "memory": 8.0 * GIB, "GPU": 1.0},
            "Labels": {
                "ray.io/accelerator-type": "H100",
                "ray.io/availability-zone": "eu-1a",
                "windfarm/link-gbit-s": "2.5",
            },
        },
        {"NodeID": "2", "Alive": False, "NodeName": "n2", "Resources": {}},
    ]
    card = Accelerator("H100", 80 * GB)
    assert topology_from_ray(records) == Topology((Node("n1", 2.0, 8 * GIB, (card,), "eu-1a", 2.5),))


@pytest.mark.parametrize("value", ["fast", "0", "-1", "nan", "inf"])
def test_a_link_that_is_no_speed_is_refused_with_its_node(value: str) -> None:
    record = {"NodeID": "1", "Alive": True, "NodeName": "n1", "Labels": {"windfarm/link-gbit-s": value}}
    with pytest.raises(TopologyError, match=r"windfarm/link-gbit-s of the node n1 is .*a number above 0"):
        topology_from_ray([record])


@pytest.mark.parametrize("value", ["80GB", "0", "-80", "nan"])
def test_a_memory_of_cards_that_is_none_is_refused_with_its_node(value: str) -> None:
    labels = {"windfarm/accelerator-memory-gb": value}
    record = {"NodeID": "1", "Alive": True, "NodeName": "n1", "Resources": {"GPU": 1}, "Labels": labels}
    with pytest.raises(TopologyError, match=r"accelerator-memory-gb of the node n1 is .*a number above 0"):
        topology_from_ray([record])
