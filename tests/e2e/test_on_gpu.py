"""The product on a machine with a GPU: vLLM has the card by itself, and shares it with the embedding model if told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.topology import ACCELERATOR_MEMORY_LABEL
from services.graphics_cards import read_cards
from services.resources import count_gpus
from tests.product import ROOT, Product, windfarm

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.requires("gpu", "vllm"), pytest.mark.timeout(600)]

MEMO = ROOT / "tests" / "data" / "documents" / "fake-memo.pdf"
# The model takes a share of the card's memory, and Ray counts shares of cards.
SHARED = {
    "llm-tiny": ({"engine_options": {"gpu_memory_utilization": 0.5}}, {"num_gpus": 0.5, "memory": 8 * 2**30}),
    "embed": ({}, {"num_gpus": 0.25, "memory": 4 * 2**30}),
}


@pytest.fixture(scope="module")
def client(product: Product) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=product.api, headers=product.headers, timeout=180) as client:
        yield client


def status(product: Product) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(product.run("status", "--json").stdout)
    return found


def pid_of(product: Product, application: str) -> int:
    (deployment,) = status(product)["applications"][application]["deployments"].values()
    (replica,) = deployment["replicas"]
    return int(replica["pid"])


def on_cards(root: int) -> list[int]:
    """Processes of this tree that hold the driver's device files open."""
    tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    return [process.pid for process in tree if _holds_card(process.pid)]


def _holds_card(pid: int) -> bool:
    links = Path(f"/proc/{pid}/fd").iterdir()
    return any(link.is_symlink() and link.readlink().name.startswith("nvidia") for link in links)


def test_the_driver_tells_every_card() -> None:
    cards = read_cards(count_gpus())
    assert len(cards) == count_gpus() > 0
    assert all(card.kind and card.memory_bytes > 2**30 for card in cards)


def test_vllm_has_the_card_and_ray_counts_it(product: Product) -> None:
    found = status(product)
    (node,) = found["nodes"]
    assert node["GPU"] == count_gpus()
    assert found["free"]["GPU"] == count_gpus() - 1
    assert float(node["labels"][ACCELERATOR_MEMORY_LABEL]) > 1
    assert on_cards(pid_of(product, "llm-tiny"))
    assert not on_cards(pid_of(product, "embed")), "it asked for no GPU"


def test_it_answers_and_cites_a_document(client: httpx.Client) -> None:
    ask_and_check(client, "memos-on-gpu")


def test_what_is_compiled_lies_in_the_data_folder(product: Product) -> None:
    assert any((product.home / "cache" / "vllm").rglob("*"))


def test_plan_and_doctor_know_the_card(product: Product) -> None:
    plan = windfarm(product.home, ["plan", "mixtral-8x7b"], check=False)
    assert read_cards(1)[0].kind in plan.stdout + plan.stderr
    checks = json.loads(product.run("doctor", "--json", check=False).stdout)
    assert "compiler" in json.dumps(checks)


def test_the_embedding_model_shares_the_card_where_it_is_told_to(
    product: Product, client: httpx.Client, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text("utf-8"))
    for application in config["applications"]:
        arguments, options = SHARED.get(application["name"], ({}, {}))
        application["args"] |= arguments
        if options:
            application["deployments"][0]["ray_actor_options"] = {"num_cpus": 0.5} | options
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    try:
        product.run("apply", "--config", str(path))
        assert status(product)["free"]["GPU"] == pytest.approx(count_gpus() - 0.75)
        assert on_cards(pid_of(product, "embed"))
        ask_and_check(client, "memos-on-shared-gpu")
    finally:
        product.run("apply", "--config", str(ROOT / "ray_config.yaml"))


def ask_and_check(client: httpx.Client, collection: str) -> None:
    client.post("/collections", json={"name": collection}).raise_for_status()
    try:
        file = (MEMO.name, MEMO.read_bytes())
        job = client.post(f"/collections/{collection}/documents?wait=true", files={"file": file}).json()["job"]
        assert job["state"] == "done", job
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "What was delivered on January 23?"}],
            "max_tokens": 64,
            "temperature": 0,
            "knowledge": {"collections": [collection]},
        }
        answer = client.post("/chat/completions", json=body)
        answer.raise_for_status()
        citation = answer.json()["windfarm"]["citations"][0]
        assert citation["document"] == MEMO.name
        assert "200 laptops delivered on January 23" in " ".join(citation["text"].split())
    finally:
        client.delete(f"/collections/{collection}").raise_for_status()
