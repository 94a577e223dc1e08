"""Who may ask the public endpoint what: keys, hosts, paths, and what is open to all."""

import logging
from pathlib import Path

import httpx
import pytest

from services.errors import unavailable
from services.model_status import read_application
from tests.services.harness import (
    EmbeddingCalls,
    ScriptedEngine,
    error_of,
    running_endpoint,
    until_ready,
    wait_until,
    words,
)


@pytest.mark.parametrize(
    ("header", "code"),
    [(None, "missing_api_key"), ("Bearer wf-wrong", "invalid_api_key"), ("Basic abc", "invalid_api_key")],
)
async def test_without_a_right_key_nothing_is_told(tmp_path: Path, header: str | None, code: str) -> None:
    headers = {"authorization": header} if header else {}
    async with running_endpoint(tmp_path) as running, httpx.AsyncClient(base_url=running.url) as stranger:
        for path in ("/v1/models", "/v1/me", "/v1/status", "/metrics", "/v1/collections", "/v1/conversations"):
            answer = await stranger.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert error_of(answer)["code"] == code
        answer = await stranger.post("/v1/chat/completions", content=b"{", headers=headers)
        assert answer.status_code == 401  # the body is not even read


async def test_health_and_readiness_are_open_and_tell_a_status_alone(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, proves=True) as running, httpx.AsyncClient(base_url=running.url) as stranger:
        assert (await stranger.get("/health")).json() == {"status": "ok"}
        answer = await stranger.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
        head = await stranger.head("/health")
        assert (head.status_code, head.content) == (200, b"")


async def test_ready_follows_a_real_token_and_a_real_vector(tmp_path: Path) -> None:
    engine = ScriptedEngine(*words("x"))
    async with running_endpoint(tmp_path, engine, proves=True) as running:
        await until_ready(running)
        assert engine.requests[0].sampling.max_tokens == 1
        assert (await running.http.get("/v1/status")).json()["ready"] is True
        await running.services[0].stop(drain_s=0)
        await running.directory.refresh()
        assert (await running.http.get("/ready")).status_code == 503


async def test_another_replica_makes_nothing_less_ready_and_the_loss_of_the_first_is_proved_anew(
    tmp_path: Path,
) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("x")), proves=True) as running:
        await until_ready(running)
        second = ScriptedEngine(*words("x"))
        await running.add_model(second, replica_id="r9")
        assert (await running.http.get("/ready")).status_code == 200
        assert second.requests == []
        await running.services[0].stop(drain_s=0)
        await running.directory.refresh()
        await until_ready(running)
        assert len(second.requests) == 1


async def test_without_a_vector_nothing_is_ready_although_tokens_come(tmp_path: Path) -> None:
    engine, embedding = ScriptedEngine(*words("x")), EmbeddingCalls()
    embedding.error = unavailable("The embedding model does not answer.", code="restarting")
    async with running_endpoint(tmp_path, engine, embedding=embedding, proves=True) as running:

        async def has_failed() -> bool:
            status = (await running.http.get("/v1/status")).json()
            return bool(status["not_ready_because"] == "The embedding model does not answer.")

        await wait_until(has_failed)
        assert engine.requests
        assert (await running.http.get("/ready")).status_code == 503
        embedding.error = None
        await until_ready(running)


async def test_a_foreign_host_name_is_refused_on_loopback(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        answer = await running.http.get("/v1/models", headers={"host": "evil.example:8000"})
        assert (answer.status_code, error_of(answer)["code"]) == (421, "unknown_host")
        for name in ("localhost:1", "127.0.0.1", "[::1]:8000"):
            assert (await running.http.get("/v1/models", headers={"host": name})).status_code == 200


async def test_no_other_web_page_may_read_answers(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        answer = await running.http.get("/v1/models", headers={"origin": "https://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_unknown_paths_and_methods_are_named(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        answer = await running.http.get("/v1/nothing")
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_path")
        answer = await running.http.get("/v1/chat/completions")
        assert (answer.status_code, error_of(answer)["message"]) == (405, "GET is not possible here, only POST.")


async def test_keys_are_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running_endpoint(tmp_path, ScriptedEngine(*words("x"))) as running:
        await running.chat(user="client-7")
        await running.http.get("/v1/models", headers={"authorization": "Bearer wf-guess"})
        assert running.key not in caplog.text
    assert "wf-guess" not in caplog.text
    assert "client_user=client-7" in caplog.text


async def test_a_revoked_key_is_refused_within_seconds(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        me = (await running.http.get("/v1/me")).json()
        running.accounts.revoke_key(me["key_id"])

        async def is_refused() -> bool:
            return (await running.http.get("/v1/me")).status_code == 401

        await wait_until(is_refused)


async def test_the_status_tells_what_serve_says_of_every_replica(tmp_path: Path) -> None:
    details = {
        "status": "RUNNING",
        "message": "",
        "deployments": {
            "ModelServer": {
                "status": "HEALTHY",
                "message": "",
                "replicas": [{"state": "RUNNING"}, {"state": "RUNNING"}, {"state": "STARTING"}],
            }
        },
    }
    states = {"llm-tiny": read_application("llm-tiny", details)}
    async with running_endpoint(tmp_path, states=states) as running:
        answer = await running.http.get("/v1/status")
    (application,) = answer.json()["applications"]
    assert application["deployments"][0]["replicas"] == {"RUNNING": 2, "STARTING": 1}
