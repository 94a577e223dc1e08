"""`windfarm up` gives a product that answers, takes a change without restarting the rest, and refuses a second up."""

import json
import socket
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.product import ROOT, Product, free_port, windfarm

pytestmark = pytest.mark.e2e


def replica_ids(product: Product) -> dict[str, Any]:
    applications = json.loads(product.run("status", "--json").stdout)["applications"]
    return {
        f"{app}/{name}": sorted(replica["id"] for replica in deployment["replicas"])
        for app, value in applications.items()
        for name, deployment in value["deployments"].items()
    }


def test_the_official_client_gets_an_answer(product: Product) -> None:
    client = openai.OpenAI(base_url=product.api, api_key=product.key)
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Say hello."}], max_tokens=8
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8


def test_status_names_every_application_as_running(product: Product) -> None:
    status = json.loads(product.run("status", "--json").stdout)
    assert status["is_ready"]
    assert {name: app["status"] for name, app in status["applications"].items()} == dict.fromkeys(
        ("llm-tiny", "embed", "store", "platform"), "RUNNING"
    )
    assert status["pending"] == []


def test_a_second_up_on_the_same_folder_is_refused(product: Product) -> None:
    answer = windfarm(product.home, ["up", "--detach", "--port", str(free_port())], check=False)
    assert answer.returncode == 1
    assert f"A windfarm runs on {product.home} already" in answer.stderr
    assert product.address in answer.stderr


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        answer = windfarm(tmp_path / "home", ["up", "--detach", "--port", str(port)], check=False)
    assert answer.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in answer.stderr
    assert "windfarm up --port" in answer.stderr
    assert not (tmp_path / "home" / "run" / "windfarm.json").exists()


def test_a_change_of_one_model_leaves_all_other_replicas_running_and_its_own_streams_whole(
    product: Product, tmp_path: Path
) -> None:
    before = replica_ids(product)
    edited = tmp_path / "edited.yaml"
    text = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")
    edited.write_text(text.replace("parallel_requests: 4", "parallel_requests: 3"), encoding="utf-8")
    client = openai.OpenAI(base_url=product.api, api_key=product.key, max_retries=0)
    stream = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=900, stream=True)
    next(stream)
    try:
        product.run("apply", "--config", str(edited))
        after = replica_ids(product)
        assert [name for name in before if before[name] != after[name]] == ["llm-tiny/ModelServer"]
        # What the former replica began, it ended: an error or a lost connection would raise here.
        assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] in ("stop", "length")
    finally:
        product.run("apply", "--config", str(ROOT / "ray_config.yaml"))


def test_a_wrong_change_is_refused_and_nothing_restarts(product: Product, tmp_path: Path) -> None:
    before = replica_ids(product)
    edited = tmp_path / "edited.yaml"
    text = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")
    edited.write_text(text.replace("parallel_requests:", "paralel_requests:"), encoding="utf-8")
    answer = product.run("apply", "--config", str(edited), check=False)
    assert answer.returncode == 1
    assert "did you mean `parallel_requests`" in answer.stderr
    assert replica_ids(product) == before


def test_ingest_search_and_ask_from_the_command_line(product: Product, tmp_path: Path) -> None:
    folder = tmp_path / "handbook"
    folder.mkdir()
    (folder / "leave.md").write_text("Every employee has 31 days of paid leave each year.", encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    answer = product.run("ingest", str(folder), "--collection", "cli", "--json", check=False)
    report = json.loads(answer.stdout)
    assert (report["added"], report["failed"], answer.returncode) == (1, 1, 1)
    again = json.loads(product.run("ingest", str(folder / "leave.md"), "--collection", "cli", "--json").stdout)
    assert (again["unchanged"], again["added"]) == (1, 0)
    found = json.loads(product.run("search", "cli", "days of paid leave", "--json").stdout)["passages"]
    assert "31 days" in found[0]["text"]
    asked = json.loads(
        product.run(
            "ask", "How many days of paid leave?", "-c", "cli", "--temperature", "0", "--max-tokens", "40", "--json"
        ).stdout
    )
    assert asked["answer"]
    assert [citation["document"] for citation in asked["citations"]] in ([], ["leave.md"])
    product.run("collections", "--delete", "cli")


def test_logs_show_each_application(product: Product) -> None:
    assert "llm-tiny/ModelServer: " in product.run("logs", "llm-tiny").stdout
    wrong = product.run("logs", "llm-huge", check=False)
    assert "llm-tiny" in wrong.stderr
