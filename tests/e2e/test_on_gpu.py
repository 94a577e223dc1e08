"""The product on a machine with a GPU: vLLM has the card by itself, and shares it with other models if told."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.topology import ACCELERATOR_MEMORY_LABEL
from services.graphics_cards import read_cards
from services.resources import GIB, count_gpus
from tests.e2e.mixture import FORBIDDEN, SECTION, make_mixture
from tests.product import ROOT, Product, windfarm

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.requires("gpu", "vllm"), pytest.mark.timeout(600)]

MEMO = ROOT / "tests" / "data" / "documents" / "fake-memo.pdf"
# Ray counts shares of a card; vLLM takes the share of its memory that it is told.
SHARES = {"llm-tiny": 0.4, "llm-mixture": 0.3, "embed": 0.2}


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
    folder = os.environ.get("VLLM_CACHE_ROOT") or product.home / "cache" / "vllm"
    assert any(Path(folder).rglob("*"))


def test_plan_and_doctor_know_the_card(product: Product, tmp_path: Path) -> None:
    assert read_cards(1)[0].kind in windfarm(tmp_path, ["plan", "tiny"]).stdout
    assert "compiler" in product.run("doctor", "--json", check=False).stdout


def test_models_share_the_card_where_they_are_told_to_and_experts_are_counted(
    product: Product, client: httpx.Client, tmp_path: Path
) -> None:
    mixture = make_mixture(tmp_path / "models").checkpoint
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text("utf-8"))
    section = yaml.safe_load(SECTION.format(folder=mixture, ranks=1, more="", replicas=1))
    for application in (applications := [*section, *config["applications"]]):
        if share := SHARES.get(application["name"]):
            memory = {"ray_actor_options": {"num_cpus": 0.5, "memory": 8 * GIB, "num_gpus": share}}
            application["deployments"][0] |= memory
            if application["name"] != "embed":
                application["args"].setdefault("engine_options", {})["gpu_memory_utilization"] = share
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump(config | {"applications": applications}), "utf-8")
    try:
        product.run("apply", "--config", str(path))
        assert status(product)["free"]["GPU"] == pytest.approx(count_gpus() - sum(SHARES.values()))
        assert all(on_cards(pid_of(product, name)) for name in SHARES)
        ask_and_check(client, "memos-on-shared-gpu")
        body = {"model": "mixture", "prompt": "One two three", "max_tokens": 5, "temperature": 0}
        used = client.post("/completions", json=body | {"logit_bias": dict.fromkeys(FORBIDDEN, -100)}).json()["usage"]
        counted = json.loads(product.run("experts", "mixture", "--json").stdout)
        assert counted["num_tokens"] == used["total_tokens"] - 1, "the last token goes through no layer"
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
