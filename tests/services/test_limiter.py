"""The limiter in a Ray of its own: one actor for all relays, made late, made again when it is killed."""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from services.errors import ApiError
from services.limit_client import LimitClient
from services.limiter import ACTOR_NAME, NAMESPACE, LimiterCalls, find_limiter
from services.limits import Limits, Refusal
from tests.services.harness import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield ray
    finally:
        ray.shutdown()


async def ask(client: LimitClient, limits: Limits, key_id: str) -> str | Refusal:
    lease_id, verdict = await client.ask(key_id, limits, 0)
    return verdict.refusal or lease_id


def actors(ray: Any) -> list[str]:
    return [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]


async def test_the_actor_is_made_by_the_first_who_asks_and_shared_by_all(ray: Any) -> None:
    assert actors(ray) == []
    clients = [LimitClient(LimiterCalls(within_s=60), answer_within_s=60) for _ in range(2)]
    limits = Limits(requests_per_minute=9)
    answers = await asyncio.gather(*(ask(clients[number % 2], limits, "shared") for number in range(40)))
    assert sum(isinstance(answer, str) for answer in answers) == 9
    assert actors(ray) == [ACTOR_NAME]
    for client in clients:
        await client.stop()


async def test_relays_in_processes_of_their_own_get_exactly_the_limit(ray: Any) -> None:
    class Relay:
        async def pid(self) -> int:
            return os.getpid()

        async def ask(self, num_requests: int) -> int:
            """Ask at once; number of admissions, which have ended when this returns."""
            client = LimitClient(LimiterCalls(), answer_within_s=60)
            limits = Limits(requests_per_minute=77, concurrent_streams=77)
            answers = await asyncio.gather(*(client.ask("processes", limits, 0) for _ in range(num_requests)))
            admitted = [lease_id for lease_id, verdict in answers if verdict.refusal is None]
            for lease_id in admitted:
                client.end(lease_id, 1)
            await client.stop()
            return len(admitted)

    relays = [ray.remote(Relay).options(num_cpus=0).remote() for _ in range(3)]
    assert len(set(await asyncio.gather(*(relay.pid.remote() for relay in relays)))) == 3
    assert sum(await asyncio.gather(*(relay.ask.remote(60) for relay in relays))) == 77
    assert sum(await asyncio.gather(*(relay.ask.remote(60) for relay in relays))) == 0


async def test_a_killed_limiter_comes_back_and_knows_what_runs(ray: Any) -> None:
    client, one = LimitClient(LimiterCalls(), sync_s=0.2), Limits(concurrent_streams=1)
    lease = await ask(client, one, "killed")
    assert isinstance(lease, str)
    os.kill(await pid(), signal.SIGKILL)
    refused: list[ApiError] = []

    async def is_decided() -> Refusal | None:
        try:
            answer = await ask(client, one, "killed")
        except ApiError as error:
            refused.append(error)
            return None
        assert isinstance(answer, Refusal), "the stream that runs was forgotten"
        return answer

    await wait_until(is_decided)
    assert {error.code for error in refused} == {"limits_unavailable"}
    assert {error.status for error in refused} == {503}
    await client.end(lease, 0).wait()
    assert isinstance(await ask(client, one, "killed"), str)
    await client.stop()


async def pid() -> int:
    """Of the actor's process."""
    import ray

    handle = await asyncio.to_thread(find_limiter)
    number: int = await handle.__ray_call__.remote(_pid)
    assert ray.is_initialized()
    return number


def _pid(_limiter: Any) -> int:
    return os.getpid()
