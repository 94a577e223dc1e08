"""Requests for a model that was scaled to zero wait, start it, and hear in time where it cannot be started."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.config import ChatConfig, PlatformConfig, QueuesConfig
from services.demand import ModelDemand
from services.discovery import ReplicaEndpoint, encode_beat
from services.errors import ApiError
from services.model_queues import ModelQueues
from services.model_status import ApplicationState, DeploymentState
from tests.services.harness import (
    Running,
    ScriptedEngine,
    chat_body,
    error_of,
    events_of,
    running_endpoint,
    until_ready,
    wait_until,
    words,
)
from tests.services.test_model_queues import Models


def asleep(status: str = "RUNNING", message: str = "") -> dict[str, ApplicationState]:
    deployment = DeploymentState("ModelServer", "HEALTHY", message, {}, scales_to_zero=True)
    store = ApplicationState("store", "RUNNING")
    return {"llm-tiny": ApplicationState("llm-tiny", status, message, (deployment,)), "store": store}


@asynccontextmanager
async def sleeping(folder: Path, states: dict[str, ApplicationState], **more: Any) -> AsyncIterator[Running]:
    """An endpoint whose only model has no replica and is started for a request. Comments come every 50 ms."""
    config = PlatformConfig(chat=ChatConfig(keep_alive_s=0.05), queues=QueuesConfig(**more.pop("queues", {})))
    async with running_endpoint(folder, config=config, states=states, **more) as running:
        yield running


async def until_waiting(running: Running, number: int) -> None:
    async def is_so() -> bool:
        return f'windfarm_waiting{{model="tiny"}} {number}.0' in (await running.http.get("/metrics")).text

    await wait_until(is_so)


async def test_a_stream_is_kept_alive_until_its_model_is_there(tmp_path: Path) -> None:
    async with sleeping(tmp_path, asleep()) as running:
        body = chat_body(stream=True)
        text, num_comments = "", 0
        async with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                text += line + "\n"
                num_comments += line.startswith(":")
                if num_comments == 3 and not running.services:
                    await running.add_model(ScriptedEngine(*words("Good", " morning")))
    events = events_of(text)
    assert events[-1] == "[DONE]"
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1] if event["choices"])
    assert said == "Good morning"


@pytest.mark.parametrize(
    "fields", [{}, {"windfarm_tools": ["calculator"]}, {"stream": True, "windfarm_tools": ["calculator"]}]
)
async def test_every_kind_of_request_waits(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with sleeping(tmp_path, asleep()) as running:
        asked = asyncio.create_task(running.chat(**fields))
        await until_waiting(running, 1)
        await running.add_model(ScriptedEngine(*words("Good", " morning")))
        answer = await asked
    assert answer.status_code == 200
    assert "morning" in answer.text


async def test_all_who_wait_are_answered(tmp_path: Path) -> None:
    async with sleeping(tmp_path, asleep()) as running:
        asked = [asyncio.create_task(running.chat()) for _ in range(12)]
        await until_waiting(running, 12)
        await running.add_model(ScriptedEngine(*words("Good", " morning")))
        answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200] * 12


async def test_who_waits_too_long_hears_what_serve_says(tmp_path: Path) -> None:
    states = asleep(message="No node has room for 4 GPUs.")
    async with sleeping(tmp_path, states, queues={"wake_wait_s": 0.1}) as running:
        answer = await running.chat()
        streamed = events_of((await running.chat(stream=True)).text)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "30"
    error = error_of(answer)
    assert error["code"] == "model_not_started"
    assert "within 0.1 s (queues.wake_wait_s)" in error["message"]
    assert "No node has room for 4 GPUs." in error["message"]
    assert streamed[-1]["error"]["code"] == "model_not_started"
    assert "[DONE]" not in streamed


async def test_a_model_that_cannot_start_ends_the_wait_at_once(tmp_path: Path) -> None:
    states = asleep()
    async with sleeping(tmp_path, states) as running:
        asked = asyncio.create_task(running.chat())
        await until_waiting(running, 1)
        states |= asleep("DEPLOY_FAILED", "The deployment failed to start 3 times.")
        await running.states.refresh()
        answer = await asked
        later = await running.chat()
    for refused in (answer, later):
        assert refused.status_code == 503
        assert "failed to start 3 times" in error_of(refused)["message"]


async def test_the_room_of_a_sleeping_model_is_bounded(tmp_path: Path) -> None:
    async with sleeping(tmp_path, asleep(), queues={"max_waiting": 2}) as running:
        asked = [asyncio.create_task(running.chat()) for _ in range(2)]
        await until_waiting(running, 2)
        refused = await running.chat()
        await running.add_model(ScriptedEngine(*words("ok")))
        answers = await asyncio.gather(*asked)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in answers] == [200, 200]


async def test_who_leaves_is_not_waited_for(tmp_path: Path) -> None:
    async with sleeping(tmp_path, asleep()) as running:
        with pytest.raises(httpx.ReadTimeout):
            await running.http.post("/v1/chat/completions", json=chat_body(), timeout=0.3)
        await until_waiting(running, 0)


async def test_an_unknown_model_is_refused_and_one_that_is_not_scaled_too(tmp_path: Path) -> None:
    deployment = DeploymentState("ModelServer", "HEALTHY", "starting")
    states = asleep() | {"llm-big": ApplicationState("llm-big", "DEPLOYING", "", (deployment,))}
    async with sleeping(tmp_path, states) as running:
        assert (await running.chat(model="none")).status_code == 404
        assert error_of(await running.chat(model="big"))["code"] == "model_not_ready"
        listed = (await running.http.get("/v1/models")).json()["data"]
    assert {model["id"]: model.get("ready") for model in listed if model["kind"] == "chat"} == {
        "big": False,
        "tiny": True,
    }


async def test_the_endpoint_is_ready_though_its_default_model_sleeps(tmp_path: Path) -> None:
    engine = ScriptedEngine(*words("ok"))
    async with sleeping(tmp_path, asleep(), proves=True) as running:
        await until_ready(running)
        await running.add_model(engine)
        assert (await running.http.get("/ready")).status_code == 200
        assert engine.requests == []


async def test_a_request_whose_last_replica_is_just_gone_starts_another_one(tmp_path: Path) -> None:
    async with sleeping(tmp_path, asleep()) as running:
        gone = ReplicaEndpoint("gone", "llm-tiny", "http://127.0.0.1:9", 1, model="tiny")
        running.beats.put(gone.key, encode_beat(gone))
        await running.directory.refresh()
        asked = asyncio.create_task(running.chat())
        await wait_until(lambda: running.endpoint.demand().get("tiny", ModelDemand()).num_begun == 1)
        await wait_until(lambda: not running.directory.replicas("tiny"))
        await running.add_model(ScriptedEngine(*words("Good", " morning")))
        answer = await asked
    assert answer.status_code == 200
    assert "Good morning" in answer.text


async def test_what_waits_is_told_and_the_first_token_after_a_start_is_not(tmp_path: Path) -> None:
    noted: list[str] = []
    async with sleeping(tmp_path, asleep()) as running:
        running.endpoint.on_sleeper = lambda: noted.append("a request waits")
        asked = asyncio.create_task(running.chat())
        await until_waiting(running, 1)
        demand = running.endpoint.demand()["tiny"]
        assert (demand.num_waiting, demand.num_begun, noted) == (1, 0, ["a request waits"])
        assert demand.waiting_tokens > 1
        await running.add_model(ScriptedEngine(*words("Good", " morning")))
        await asked
        demand = running.endpoint.demand()["tiny"]
        assert (demand.num_waiting, list(demand.first_tokens)) == (0, [])
        await running.chat()
        await running.chat(stream=True)
        demand = running.endpoint.demand()["tiny"]
    assert len(demand.first_tokens) == 2
    assert demand.seconds_per_token is not None
    assert noted == ["a request waits"]


async def test_a_request_that_is_called_when_its_patience_ends_begins() -> None:
    models = Models(0, starts_on_demand=True)
    queues = ModelQueues(QueuesConfig(wake_wait_s=1.5), models)

    async def ask() -> str:
        async with queues.place("tiny", "a", "default", 1):
            return "begun"

    patient, gone = asyncio.create_task(ask()), asyncio.create_task(ask())
    await wait_until(lambda: queues.sizes().get("tiny") == (0, 2))
    gone.cancel()
    await wait_until(lambda: queues.sizes()["tiny"] == (0, 1))
    models.slots = 1
    assert await patient == "begun"
    models.slots = 0
    with pytest.raises(ApiError, match="has no room"):
        await ask()
    assert queues.sizes() == {"tiny": (0, 0)}
