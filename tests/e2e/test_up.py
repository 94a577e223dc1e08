"""`windfarm up` gives a product that answers, takes a change without restarting the rest, and refuses a second up."""

import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.other_code import APPLY, BROKEN, CHANGED, noting, other_checkout
from tests.product import ROOT, Product, free_port, run, windfarm

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


def test_status_names_the_one_machine_as_alive(product: Product) -> None:
    (node,) = json.loads(product.run("status", "--json").stdout)["nodes"]
    assert node["alive"] is True
    assert node["address"] == "127.0.0.1"


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
    stream = long_stream(product)
    try:
        with asking(product) as answers:
            product.run("apply", "--config", str(edited))
            after = replica_ids(product)
        assert [name for name in before if before[name] != after[name]] == ["llm-tiny/ModelServer"]
        # What the former replica began, it ended: an error or a lost connection would raise here.
        assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] in ("stop", "length")
        assert set(answers) == {"200"}
    finally:
        product.run("apply", "--config", str(ROOT / "ray_config.yaml"))


def processes(product: Product) -> dict[str, int]:
    """Of the deployments' replicas that serve; those before them may still end their streams."""
    applications = json.loads(product.run("status", "--json").stdout)["applications"]
    return {
        name: replica["pid"]
        for app in applications.values()
        for name, deployment in app["deployments"].items()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


def test_changed_code_is_brought_to_every_application_without_a_failed_request(
    product: Product, tmp_path: Path
) -> None:
    """From another checkout, as it would be after `git pull` in this one; then back, from this one. In between the
    endpoint alone is changed: what comes between one relay and the next waits at the port, streams end where they
    began."""
    notes = tmp_path / "notes"
    checkout = other_checkout(tmp_path / "checkout", noting(notes))
    with httpx.Client(base_url=product.api, headers=product.headers, timeout=120, trust_env=False) as client:
        client.post("/collections", json={"name": "changed"}).raise_for_status()
        badges = {"file": ("badges.md", b"Each visitor gets a yellow badge at the gate.")}
        client.post("/collections/changed/documents?wait=true", files=badges).raise_for_status()
    asked: dict[str, dict[str, Any]] = {
        "completions": ONE_WORD,
        "embeddings": {"model": "embed", "input": "Which badge?"},
        "collections/changed/search": {"query": "badge", "top_k": 1},
        "chat/completions": {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Which badge does a visitor get?"}],
            "knowledge": {"collections": ["changed"]},
            "max_tokens": 4,
        },
    }
    with ExitStack() as clients:
        # The cores are for the starts.
        answers = [clients.enter_context(asking(product, path, body, pause_s=0.4)) for path, body in asked.items()]
        try:
            stream = long_stream(product, max_tokens=300)
            rolled = run(product.home, APPLY, check=True, root=checkout)
            after = processes(product)
            noted = {path.name for path in notes.iterdir()}
            streams = [stream, long_stream(product)]
            file = checkout / "ray_config.yaml"
            file.write_text(file.read_text().replace("default_max_tokens: 512", "default_max_tokens: 500"))
            run(product.home, APPLY, check=True, root=checkout)
            edited = processes(product)
            ends = [[part.choices[0].finish_reason for part in each if part.choices][-1] for each in streams]
        finally:
            back = product.run("apply", "--config", str(ROOT / "ray_config.yaml"))
    product.run("collections", "--delete", "changed")
    assert [set(each) for each in answers] == [{"200"}] * len(asked)
    assert min(map(len, answers)) > 1
    assert set(ends) <= {"stop", "length"}
    assert sorted(after) == sorted(CHANGED.values())
    assert noted == {f"{name}-{pid}" for name, pid in after.items()}
    assert {name for name in after if edited[name] != after[name]} == {"Gateway", "Ui"}
    for said in (rolled, back):
        assert "4 applications, one after the other: llm-tiny, embed, store, platform" in " ".join(said.stderr.split())
    ran = {(name, pid) for each in (after, edited) for name, pid in each.items()}
    assert {path.name for path in notes.iterdir()} == {f"{name}-{pid}" for name, pid in ran}
    assert not {*processes(product).items()} & ran
    applications = json.loads(product.run("status", "--json").stdout)["applications"]
    assert len({app["code"] for app in applications.values()}) == 1


def test_code_that_does_not_start_stops_the_change_at_its_first_application_until_other_code_comes(
    product: Product, tmp_path: Path
) -> None:
    checkout = other_checkout(tmp_path / "checkout", {"services/model_server.py": BROKEN})
    before = replica_ids(product)
    ask_vectors = asking(product, "embeddings", {"model": "embed", "input": "Which badge?"}, pause_s=0.4)
    with ask_vectors as answers:
        try:
            failed = run(product.home, APPLY, check=False, root=checkout)
            applications = json.loads(product.run("status", "--json").stdout)["applications"]
            with httpx.Client(base_url=product.api, headers=product.headers, timeout=120, trust_env=False) as client:
                refused = client.post("/completions", json=ONE_WORD)
        finally:
            back = product.run("apply", "--config", str(ROOT / "ray_config.yaml"))
    with asking(product) as later:
        while not later:
            time.sleep(0.1)
    assert failed.returncode == 1
    for said in ("there is a fault in this code", "What comes after it was not changed"):
        assert said in " ".join(failed.stderr.split())
    assert [name for name, app in applications.items() if app["status"] != "RUNNING"] == ["llm-tiny"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_ready")
    assert set(answers) == {"200"} == set(later)
    assert "1 application, one after the other: llm-tiny" in " ".join(back.stderr.split())
    after = replica_ids(product)
    assert [name for name in before if before[name] != after[name]] == ["llm-tiny/ModelServer"]


def long_stream(product: Product, max_tokens: int = 900) -> "openai.Stream[Any]":
    """One that has begun."""
    client = openai.OpenAI(base_url=product.api, api_key=product.key, max_retries=0, timeout=240)
    stream = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=max_tokens, stream=True)
    next(stream)
    return stream


ONE_WORD = {"model": "tiny", "prompt": "One", "max_tokens": 2}


@contextmanager
def asking(
    product: Product, path: str = "completions", body: Mapping[str, Any] = ONE_WORD, pause_s: float = 0.1
) -> Iterator[list[str]]:
    """Short requests one after the other while the block runs, each on a connection of its own; what came of each."""
    answers: list[str] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.wait(pause_s):
            try:
                answer = httpx.post(
                    f"{product.api}/{path}", json=body, headers=product.headers, timeout=240, trust_env=False
                )
                answers.append(str(answer.status_code) if answer.is_success else f"{answer.status_code} {answer.text}")
            except httpx.TransportError as error:
                answers.append(repr(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        is_over.set()
        thread.join()


class KeyAdder(http.server.BaseHTTPRequestHandler):
    """Passes everything on to the product's own API with the product's key, as a team's gateway would."""

    product: Product

    def do_GET(self) -> None:
        self.pass_on(None)

    def do_POST(self) -> None:
        self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

    def pass_on(self, body: bytes | None) -> None:
        headers = self.product.headers | {"Content-Type": "application/json"}
        with httpx.stream(
            self.command, f"{self.product.address}{self.path}", headers=headers, content=body, timeout=120
        ) as answer:
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["content-type"])
            self.end_headers()
            for part in answer.iter_raw():
                self.wfile.write(part)
                self.wfile.flush()

    def log_message(self, *_: object) -> None: ...


@contextmanager
def remote_api(product: Product) -> Iterator[str]:
    """An OpenAI-compatible API somewhere else, which is the product itself."""
    handler = type("Handler", (KeyAdder,), {"product": product})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def one_line(model: str, arguments: str) -> str:
    return (
        f"  - {{name: llm-{model}, route_prefix: null, import_path: 'services.app:build_model', "
        f"args: {{id: {model}, {arguments}}}}}\n"
    )


def test_one_line_adds_a_model_from_a_file_or_a_remote_api_and_nothing_restarts(
    product: Product, tmp_path: Path
) -> None:
    before = replica_ids(product)
    (weights,) = (product.home / "models" / "tiny" / "gguf").glob("*.gguf")
    text = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")
    edited = tmp_path / "edited.yaml"
    with remote_api(product) as url:
        lines = one_line("second", f"source: '{weights}', memory_gib: 1.2, parallel_requests: 1")
        lines += one_line("third", f"source: '{url}', engine: remote, remote_model: tiny")
        edited.write_text(text.replace("applications:\n", f"applications:\n{lines}", 1), encoding="utf-8")
        try:
            product.run("apply", "--config", str(edited))
            after = replica_ids(product)
            assert {name: after[name] for name in before} == before
            assert after.keys() - before.keys() == {"llm-second/ModelServer", "llm-third/ModelServer"}
            client = openai.OpenAI(base_url=product.api, api_key=product.key)
            assert {"tiny", "second", "third"} <= {model.id for model in client.models.list()}
            said = {
                model: client.completions.create(model=model, prompt="One, two,", max_tokens=6, temperature=0)
                for model in ("tiny", "second", "third")
            }
        finally:
            product.run("apply", "--config", str(ROOT / "ray_config.yaml"))
    assert len({answer.choices[0].text for answer in said.values()}) == 1
    assert {name for name, answer in said.items() if answer.model == name} == set(said)
    assert replica_ids(product) == before


def test_a_killed_model_comes_back_and_the_endpoint_goes_on_meanwhile(product: Product) -> None:
    def pid_of(app: str, deployment: str) -> int:
        applications = json.loads(product.run("status", "--json").stdout)["applications"]
        (replica,) = applications[app]["deployments"][deployment]["replicas"]
        return int(replica["pid"])

    endpoint, model = pid_of("platform", "Gateway"), pid_of("llm-tiny", "ModelServer")
    client = openai.OpenAI(base_url=product.api, api_key=product.key, max_retries=0, timeout=120)
    os.kill(model, signal.SIGKILL)
    assert client.models.list().data
    deadline = time.monotonic() + 120
    while True:
        try:
            answer = client.completions.create(model="tiny", prompt="Once", max_tokens=4)
            break
        except openai.APIStatusError as error:
            assert error.status_code in (502, 503), error
            assert time.monotonic() < deadline, error
            time.sleep(0.2)
    assert answer.choices[0].text
    while httpx.get(f"{product.address}/ready", timeout=60).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert pid_of("platform", "Gateway") == endpoint
    assert pid_of("llm-tiny", "ModelServer") != model


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
    missed = product.run("ingest", str(folder / "leaf.md"), "--collection", "slip", "--json", check=False)
    assert (missed.returncode, json.loads(missed.stdout)["failed"]) == (1, 1)
    assert "slip" not in product.run("collections").stdout


def test_a_chat_in_the_terminal_remembers_what_was_said(product: Product) -> None:
    answer = product.run("chat", "--max-tokens", "12", "--temperature", "0", typed="My name is Ada.\nWho am I?\n\n")
    prompts = answer.stdout.split("> ")
    assert len(prompts) == 4, answer.stdout  # nothing, two answers, and what the empty line ends
    assert prompts[1].strip()
    assert prompts[2].strip()
    client = openai.OpenAI(base_url=product.api, api_key=product.key)
    messages: Any = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": prompts[1].strip()},
        {"role": "user", "content": "Who am I?"},
    ]
    alike = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert alike.choices[0].message.content is not None
    assert prompts[2].split() == alike.choices[0].message.content.split()


def test_logs_show_each_application(product: Product) -> None:
    assert "llm-tiny/ModelServer: " in product.run("logs", "llm-tiny").stdout
    wrong = product.run("logs", "llm-huge", check=False)
    assert "llm-tiny" in wrong.stderr
