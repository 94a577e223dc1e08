"""A model that sleeps is woken by a request, grows under load without a failed one, shrinks around a stream that goes
on, and sleeps again."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import openai
import pytest
import yaml

from services.scaling_config import SCALING_POLICY
from tests.e2e.story_client import ENDLESS
from tests.product import ROOT, Product

pytestmark = pytest.mark.e2e

MODEL = "elastic"
NUM_SLOTS, MAX_REPLICAS, NUM_CLIENTS = 2, 3, 5
LIMIT_S = 100
LONG_ANSWER = 300


@pytest.fixture
def scaled(product: Product, tmp_path: Path) -> Iterator[Product]:
    """The running product with one more model: small engines of 2 slots and 1 thread, from none to three."""
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    scaling = {"min_replicas": 0, "max_replicas": MAX_REPLICAS, "policy": {"policy_function": SCALING_POLICY}}
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 1, "downscale_to_zero_delay_s": 1}
    config["applications"].append(
        {
            "name": f"llm-{MODEL}",
            "route_prefix": None,
            "import_path": "services.app:build_model",
            "args": {"id": MODEL, "parallel_requests": NUM_SLOTS, "threads": 1, "max_context": 512},
            "deployments": [
                {
                    "name": "ModelServer",
                    "autoscaling_config": scaling | delays,
                    "ray_actor_options": {"num_cpus": 0.1, "memory": 300 << 20},
                }
            ],
        }
    )
    edited = tmp_path / "edited.yaml"
    edited.write_text(yaml.safe_dump(config), encoding="utf-8")
    try:
        product.run("apply", "--config", str(edited))
        yield product
    finally:
        product.run("apply", "--config", str(ROOT / "ray_config.yaml"))


def num_replicas(product: Product) -> int:
    status = httpx.get(f"{product.api}/status", headers=product.headers, timeout=30, trust_env=False)
    assert status.status_code == 200, status.text
    return sum(each["model"] == MODEL and each["state"] == "ready" for each in status.json()["replicas"])


def wait_for(product: Product, number: int) -> None:
    deadline = monotonic() + LIMIT_S
    while num_replicas(product) != number:
        assert monotonic() < deadline, product.run("status", "--json").stdout
        sleep(0.2)


def ask(client: openai.OpenAI, prompt: str, **more: Any) -> str:
    """A whole streamed answer; how it ended."""
    messages: list[Any] = [{"role": "user", "content": prompt}]
    chunks = client.chat.completions.create(model=MODEL, messages=messages, stream=True, **more)
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    return str(ends[-1])


def long_answer(product: Product, number: int) -> str:
    """The whole body of a streamed answer. Each begins differently, lest all run where the first one did."""
    body = {
        "model": MODEL,
        "prompt": f"{number} keepers of a lighthouse",
        "max_tokens": LONG_ANSWER,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": ENDLESS,
    }
    return httpx.post(
        f"{product.api}/completions", json=body, headers=product.headers, timeout=LIMIT_S, trust_env=False
    ).text


def test_a_model_wakes_for_a_request_grows_under_load_shrinks_around_a_stream_and_sleeps_again(scaled: Product) -> None:
    client = openai.OpenAI(base_url=scaled.api, api_key=scaled.key, max_retries=0, timeout=LIMIT_S)
    assert num_replicas(scaled) == 0
    assert {model.id for model in client.models.list()} >= {MODEL}
    assert ask(client, "Say hello.", max_tokens=4) in ("stop", "length")

    is_grown = is_shrunk = False
    ends: list[str] = []
    long_answers: list[str] = []

    def keep_asking(reader: int) -> None:
        while not is_grown:
            ends.append(ask(client, f"Reader {reader}: tell me a story about a lighthouse.", max_tokens=64))

    def keep_one_stream_running() -> None:
        while not is_shrunk:
            long_answers.append(long_answer(scaled, len(long_answers)))

    with ThreadPoolExecutor(NUM_CLIENTS + 1) as threads:
        clients = [threads.submit(keep_asking, reader) for reader in range(NUM_CLIENTS)]
        try:
            wait_for(scaled, MAX_REPLICAS)
            clients.append(threads.submit(keep_one_stream_running))
            is_grown = True
            wait_for(scaled, 1)
        finally:
            is_grown = is_shrunk = True
        for each in clients:
            each.result()  # any failed request is raised here
    assert len(ends) >= NUM_CLIENTS
    assert set(ends) <= {"stop", "length"}
    assert long_answers
    for answer in long_answers:
        assert answer.endswith("data: [DONE]\n\n"), answer[-300:]
        assert f'"completion_tokens":{LONG_ANSWER}' in answer.replace(" ", ""), answer[-600:]

    wait_for(scaled, 0)
    status = json.loads(scaled.run("status", "--json").stdout)
    assert status["is_ready"]
    assert status["applications"][f"llm-{MODEL}"]["status"] == "RUNNING"
