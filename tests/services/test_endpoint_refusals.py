"""What the public endpoint says to input that it cannot take."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.engine import GenerationChunk
from cluster.errors import ClusterError, ContextTooLong, EngineDead
from services.config import PlatformConfig, StreamsConfig
from services.model_status import ApplicationState, DeploymentState
from tests.chaos.provider_faults import before_provider, engine_at
from tests.services.harness import (
    ScriptedEngine,
    error_of,
    running_endpoint,
    words,
)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "empty_body"),
        (b"not json", "invalid_json"),
        (b'{"model": "tiny", "messages": "hi"}', "invalid_type"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temprature": 1}', "unknown_parameter"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "missing_required_parameter"),
    ],
)
async def test_bad_bodies_get_400_with_a_code(tmp_path: Path, body: bytes, code: str) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        answer = await running.http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert answer.headers["x-request-id"].startswith("req_")


async def test_a_too_long_body_gets_413_and_other_media_415(tmp_path: Path) -> None:
    config = PlatformConfig(max_body_mib=0.01)
    async with running_endpoint(tmp_path, ScriptedEngine(), config=config) as running:
        answer = await running.chat(messages=[{"role": "user", "content": "x" * 15_000}])
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_long")
        answer = await running.http.post("/v1/chat/completions", data={"model": "tiny"})
        assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")


async def test_an_answer_beyond_the_context_names_both_numbers(tmp_path: Path) -> None:
    refusal = ContextTooLong("The prompt has 7 tokens and max_tokens asks for 99 more, but the context is 64 tokens.")
    async with running_endpoint(tmp_path, ScriptedEngine(refusal)) as running:
        for stream in (False, True):
            answer = await running.chat(max_tokens=99, stream=stream)
            assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
            assert "99" in error_of(answer)["message"]
            assert "64" in error_of(answer)["message"]


async def test_our_own_answer_limit_gives_way_where_the_context_leaves_less(tmp_path: Path) -> None:
    class Narrow(ScriptedEngine):
        async def generate(self, request: Any) -> AsyncIterator[GenerationChunk]:
            if request.sampling.max_tokens is not None:
                raise ContextTooLong("Too much.", param="max_tokens")
            async for chunk in super().generate(request):
                yield chunk

    async with running_endpoint(tmp_path, Narrow(*words("fits"))) as running:
        answer = await running.chat()
    assert answer.json()["choices"][0]["message"]["content"] == "fits"


async def test_a_model_that_starts_is_503_with_what_serve_says(tmp_path: Path) -> None:
    pending = DeploymentState("ModelServer", "UPDATING", "It needs 4 CPUs, 2 are there.", {"STARTING": 1})
    states = {"llm-big": ApplicationState("llm-big", "DEPLOYING", "", (pending,))}
    async with running_endpoint(tmp_path, ScriptedEngine(), states=states) as running:
        answer = await running.chat(model="big")
        listed = (await running.http.get("/v1/models")).json()["data"]
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_ready")
    assert "'llm-big' is DEPLOYING. Ray Serve says: It needs 4 CPUs, 2 are there." in error_of(answer)["message"]
    assert answer.headers["retry-after"] == "5"
    assert [(model["id"], model.get("ready")) for model in listed] == [("tiny", True), ("big", False), ("embed", None)]


async def test_a_model_whose_provider_is_away_is_not_ready_until_the_provider_answers_again(tmp_path: Path) -> None:
    """What Ray Serve does with the replica is done by hand: after three failed checks in a row it ends, and none begins
    while the provider does not answer."""
    states = {"llm-tiny": ApplicationState("llm-tiny", "RUNNING")}
    config = PlatformConfig(streams=StreamsConfig(move_wait_s=0.2))
    async with before_provider(tmp_path, config=config, states=states) as (running, provider):
        assert (await running.chat()).status_code == 200
        provider.is_away = True
        failed = await running.chat()
        assert (failed.status_code, error_of(failed)["code"]) == (500, "generation_failed")
        (replica,) = running.services
        for _ in range(3):
            with pytest.raises(EngineDead):
                await replica.check_health()
        await replica.stop(drain_s=0)
        await running.directory.refresh()
        states["llm-tiny"] = ApplicationState("llm-tiny", "UNHEALTHY", "A replica failed its health check.")
        await running.states.refresh()
        with pytest.raises(ClusterError):
            await running.add_model(engine_at(provider), replica_id="r2")
        refused = await running.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "model_not_ready")
        assert "A replica failed its health check." in error_of(refused)["message"]
        assert int(refused.headers["retry-after"]) >= 1
        provider.is_away = False
        await running.add_model(engine_at(provider), replica_id="r3")
        assert (await running.chat()).status_code == 200


async def test_the_embedding_model_does_not_chat_and_chat_models_do_not_embed(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        answer = await running.chat(model="embed")
        assert (answer.status_code, error_of(answer)["param"]) == (400, "model")
        answer = await running.http.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
        assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
        answer = await running.http.post("/v1/embeddings", json={"model": "embed", "input": "a", "dimensions": 3})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "dimensions")
