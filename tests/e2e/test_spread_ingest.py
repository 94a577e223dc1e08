"""A large document is embedded on both nodes of a cluster that has a replica of the embedding model on each.

A cluster of its own, so `make test-ranks` runs it. That no replica is left idle while there are batches is tested in
`tests/services/test_ingestion_spread.py`, without one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from services import supervisor
from tests.product import ROOT, Product, start_product

pytestmark = [pytest.mark.e2e, pytest.mark.ranks, pytest.mark.timeout(420)]

NUM_SECTIONS = 400
LEAST_SHARE = 0.2
"""Of the computing, for each replica: less is what a replica does that only waits."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("spread")
    config = folder / "two.yaml"
    config.write_text(yaml.safe_dump(with_two_embedders()), "utf-8")
    with start_product(folder / "home", ["--local-nodes", "2", "--config", str(config)]) as product:
        yield product


def with_two_embedders() -> dict[str, Any]:
    """The configuration of the repository with a second embedding replica, on another node."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "ray_config.yaml").read_text("utf-8"))
    (embed,) = (each for each in config["applications"] if each["name"] == "embed")
    embed["args"]["threads"] = 1
    embed["deployments"][0] |= {"num_replicas": 2, "max_replicas_per_node": 1}
    return config


def embedders(product: Product) -> dict[int, str]:
    """Processes of the running replicas, each with the address of its node."""
    deployment = supervisor.status(product.home)["applications"]["embed"]["deployments"]["Embedding"]
    return {each["pid"]: each["node"] for each in deployment["replicas"] if each["state"] == "RUNNING"}


def computed_s(pid: int) -> float:
    """Seconds of a processor that the process has used."""
    used = psutil.Process(pid).cpu_times()
    return used.user + used.system


def section(number: int) -> str:
    words = f"Gate {number} is opened by guard {number} when the tide has turned and the bell has rung. "
    return words + "Whoever passes shows a pass, and carts wait behind the chain until the bridge is down. " * 4


def test_the_replicas_of_both_nodes_share_one_document(cluster: Product, tmp_path: Path) -> None:
    nodes = embedders(cluster)
    assert len(nodes) == len(set(nodes.values())) == 2, "one on each node"
    file = tmp_path / "large.md"
    file.write_text("\n\n".join(f"# Gate {n}\n\n{section(n)}" for n in range(NUM_SECTIONS)), "utf-8")
    before = {pid: computed_s(pid) for pid in nodes}
    ended = json.loads(cluster.run("ingest", str(file), "--collection", "gates", "--json").stdout)
    used = {pid: computed_s(pid) - before[pid] for pid in nodes}
    assert (ended["added"], ended["failed"]) == (1, 0), ended
    assert min(used.values()) > LEAST_SHARE * sum(used.values()) > 1.0, used
    found = json.loads(cluster.run("search", "gates", "Who opens gate 321?", "--json").stdout)["passages"]
    assert "guard 321" in found[0]["text"]
