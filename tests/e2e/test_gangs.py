"""A sparse model in gangs over three nodes, beside replicas of a dense one: placed, changed, broken, and served again.

One cluster is started for all of it, in network namespaces where this machine allows them. `make test-ranks` runs all
of it in this order.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.control import read_state
from services.local_network import interfaces, namespaces, why_no_network
from services.processes import Process, descendants, find_process, tagged
from tests.e2e.cluster_view import (
    gangs_of,
    num_running,
    num_whole,
    process_of_node,
    replicas_of,
    status_of,
    tag_of,
    wait_for,
)
from tests.e2e.mixture import EXPERTS, LAYERS, Mixture, Oracle, make_mixture, write_config
from tests.e2e.other_code import APPLY, noting, other_checkout
from tests.e2e.story_client import WAIT_S, Client, asking, is_whole
from tests.e2e.test_closed import ESTABLISHED, LISTEN, is_loopback, sockets_of, title
from tests.product import Product, run, start_product

PROMPTS = ("A river", "Winter in Rome", "def main", "the price of 7 apples", "Wo ist", "science and")

pytestmark = [pytest.mark.e2e, pytest.mark.requires("vllm"), pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return make_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def oracle(mixture: Mixture) -> Oracle:
    return Oracle(mixture)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, mixture: Mixture) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("gangs")
    config = write_config(folder, mixture)
    with start_product(folder / "home", ["--local-nodes", "3", "--config", str(config)]) as product:
        wait_for(product, lambda status: num_whole(status) == 2 and num_running(status, "llm-tiny") == 2)
        yield product


def engines_of(product: Product) -> list[Process]:
    """The processes in which vLLM computes."""
    return [process for process in tagged(tag_of(product)) if "EngineCore" in title(process)]


def processes_of(gang: dict[str, Any]) -> list[Process]:
    """What the replicas of a gang have started: the processes in which vLLM computes."""
    return [process for rank in gang["ranks"] for process in descendants(rank["pid"])]


def ranks_told(metrics: str) -> set[tuple[str, str]]:
    """Gang and rank of each series of routed tokens."""
    series = re.findall(r"windfarm_expert_rank_tokens\w*\{([^}]*)\}", metrics)
    return {(label("gang", labels), label("rank", labels)) for labels in series}


def label(name: str, labels: str) -> str:
    return labels.partition(f'{name}="')[2].partition('"')[0]


def test_two_gangs_and_two_replicas_serve_side_by_side(cluster: Product) -> None:
    status = status_of(cluster)
    gangs = gangs_of(status)
    assert len(gangs) == 2
    for gang in gangs.values():
        assert [rank["rank"] for rank in gang["ranks"]] == [0, 1]
        assert len({rank["node"] for rank in gang["ranks"]}) == 2  # each rank has a node of its own
    assert len([node for node in status["nodes"] if node["alive"]]) == 3
    assert len({node["address"] for node in status["nodes"]}) == 3
    # Where there is a choice, not on the same one.
    assert len({replica["node"] for replica in replicas_of(status, "llm-tiny")}) == 2
    shown = cluster.run("status").stdout
    assert all(name in shown for name in gangs)


async def test_both_models_answer_at_once(cluster: Product) -> None:
    async with Client(cluster) as client:
        names = [f"answer {number}" for number in range(8)]
        answers = await asyncio.gather(
            *(client.stream("mixture", name, 16) for name in names),
            *(client.stream("tiny", name, 16) for name in names),
        )
    assert all(is_whole(events) for events in answers)


async def test_gangs_answer_as_transformers_does(cluster: Product, oracle: Oracle) -> None:
    """Without a chat template: a model of two layers would answer all chats alike."""
    async with Client(cluster) as client:
        told = await asyncio.gather(*(client.complete("mixture", prompt, 12) for prompt in PROMPTS))
    assert len(set(told)) > 1, "answers that are all alike show nothing"
    assert told == [oracle.complete(prompt, 12) for prompt in PROMPTS]


async def test_experts_are_counted_and_the_trace_plans_the_next_start(
    cluster: Product, mixture: Mixture, tmp_path: Path
) -> None:
    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(cluster.run("experts", "mixture", "--json").stdout)
        return found

    before = read()
    async with Client(cluster) as client:
        assert is_whole(await client.stream("mixture", "the counted answer", 16))
        after = read()
        ranks = {(gang["gang"], str(rank)) for gang in after["gangs"] for rank in (0, 1)}
        async with asyncio.timeout(WAIT_S):
            while ranks_told(await client.metrics()) != ranks:  # noqa: ASYNC110  # who is busy is left out
                await asyncio.sleep(1)
    assert after["missing"] == []
    assert len(after["gangs"]) == 2
    # The prompt and all tokens of the answer but the last, which is computed and never read.
    assert after["num_tokens"] - before["num_tokens"] > 16
    for layer in after["tokens"]:
        assert sum(layer) == after["num_tokens"] * after["experts_per_token"]
    for gang in after["gangs"]:
        assert [sum(ranks) for ranks in gang["rank_tokens"]] == [sum(layer) for layer in gang["tokens"]]
    trace = tmp_path / "trace.json"
    shown = cluster.run("experts", "mixture", "--save", str(trace)).stdout
    assert all(gang["gang"] in shown for gang in after["gangs"])
    balance = plan_of(cluster, mixture, trace)["balance"]
    assert balance["bound"] <= balance["planned"] <= balance["linear"]


def test_the_ranks_of_both_gangs_hold_the_experts_that_the_plan_of_their_section_gives_them(
    cluster: Product, mixture: Mixture
) -> None:
    planned = [rank["experts"] for rank in plan_of(cluster, mixture, mixture.trace)["replicas"][0]["ranks"]]
    assert planned[0] != [list(range(EXPERTS // 2))] * LAYERS, "linear, as without a plan"
    answer = httpx.get(
        f"{cluster.api}/cluster/experts",
        params={"model": "mixture"},
        headers=cluster.headers,
        timeout=WAIT_S,
        trust_env=False,
    )
    assert [held_by_ranks(gang) for gang in answer.json()["gangs"]] == [planned, planned]


def plan_of(cluster: Product, mixture: Mixture, trace: Path) -> dict[str, Any]:
    arguments = (str(mixture.checkpoint), "--data", "2", "--load", str(trace), "--json")
    found: dict[str, Any] = json.loads(cluster.run("plan", *arguments).stdout)
    return found


def held_by_ranks(gang: dict[str, Any]) -> list[list[list[int]]]:
    """Experts as [rank][layer], as a plan has them."""
    return [
        [[expert for expert, holder in enumerate(layer) if holder == rank] for layer in gang["rank_of"]]
        for rank in (0, 1)
    ]


@pytest.mark.ranks
def test_shards_talk_over_a_network_and_nobody_else_can_listen_or_call(cluster: Product) -> None:
    processes = tagged(tag_of(cluster))
    engines = engines_of(cluster)
    assert len(engines) == 4
    talking = {s.remote[0] for s in sockets_of(engines) if s.state == ESTABLISHED} - {"127.0.0.1"}
    if why_no_network() is not None:
        assert [s for s in sockets_of(processes) if s.state == LISTEN and not is_loopback(s.local[0])] == []
        return
    assert {f"198.18.0.{number}" for number in (1, 2, 3)} & talking
    # What of the product listens in the network of this machine: only the public port, on loopback.
    listening = {line.split()[9]: line.split()[1] for line in listening_here()}
    ours = {
        listening[inode]
        for process in processes
        for descriptor in descriptors(process.pid)
        if (inode := descriptor.removeprefix("socket:[").removesuffix("]")) in listening
    }
    assert ours == {f"0100007F:{cluster.port:04X}"}


def listening_here() -> list[str]:
    lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return [line for line in lines if line.split()[3] == LISTEN]


def descriptors(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(str(path.readlink()))
    return found


async def test_a_killed_rank_ends_its_gang_alone_and_its_streams_go_on_at_the_other_gang(
    cluster: Product, record_property: Callable[[str, object], None]
) -> None:
    before = gangs_of(status_of(cluster))
    lost, kept = sorted(before)
    victim = before[lost]["ranks"][1]["pid"]
    computing = processes_of(before[lost])
    assert len(computing) >= 2
    names = [f"stream {number}" for number in range(16)]
    async with Client(cluster) as client:
        streams = [asyncio.create_task(client.stream("mixture", name)) for name in names]
        await client.until_begun(names)
        assert not any(task.done() for task in streams), "a stream ended before all 16 ran"
        async with asking(client, "tiny") as dense, asking(client, "mixture") as sparse:
            os.kill(victim, signal.SIGKILL)
            ended = await asyncio.gather(*streams)
            status = await asyncio.to_thread(wait_for, cluster, lambda now: num_whole(now) == 2)
            moved = await client.metrics()
        assert [events[-1] for events in ended if not is_whole(events)] == []
        assert 'windfarm_streams_moved_total{model="mixture"}' in moved, "no stream was in the lost gang"
        assert [events[-1] for events in [*dense, *sparse] if not is_whole(events)] == []
        assert len(dense) > 1
        assert len(sparse) > 1
        after = gangs_of(status)
        assert kept in after
        assert lost not in after
        assert [rank["pid"] for rank in after[kept]["ranks"]] == [rank["pid"] for rank in before[kept]["ranks"]]
        (restart,) = status["gangs"]["llm-mixture"]["restarts"]
        assert restart["lost_gang"] == lost
        assert 0 < restart["seconds"] < WAIT_S
        record_property("seconds until a lost gang served again", round(restart["seconds"], 1))
        assert f"gang {lost} lost rank" in cluster.run("status").stdout
        log = (cluster.home / "logs" / "windfarm.log").read_text(encoding="utf-8")
        assert f"serves in place of {lost}" in log
        # Nothing of the lost gang is left, engines included.
        gone = {rank["pid"] for rank in before[lost]["ranks"]}
        assert not [pid for pid in gone if (process := find_process(pid)) is not None and process.is_alive]
        assert [process for process in computing if process.is_alive] == []
        answers = await asyncio.gather(*(client.stream("mixture", name, 8) for name in names))
        assert all(is_whole(events) for events in answers)


def tiny_replicas(status: dict[str, Any]) -> list[str]:
    return sorted(replica["id"] for replica in replicas_of(status, "llm-tiny"))


async def test_one_gang_less_drops_no_request_of_another_model(
    cluster: Product, mixture: Mixture, tmp_path: Path
) -> None:
    before = tiny_replicas(status_of(cluster))
    fewer = write_config(tmp_path, mixture, gangs=1)
    async with Client(cluster) as client, asking(client, "tiny") as answers:
        long = asyncio.create_task(client.stream("tiny", "a long answer", 600))
        await client.until_begun(["a long answer"])
        kept = gangs_of(await asyncio.to_thread(status_of, cluster))
        computing = {name: processes_of(gang) for name, gang in kept.items()}
        await asyncio.to_thread(cluster.run, "apply", "--config", str(fewer))
        status = await asyncio.to_thread(wait_for, cluster, lambda now: num_whole(now) == 1)
        (remaining,) = gangs_of(status)
        (ended,) = kept.keys() - {remaining}
        assert is_whole(await long)
    # Of vLLM's processes those alone are left that belong to the gang that goes on.
    await asyncio.to_thread(wait_for, cluster, lambda _: not any(process.is_alive for process in computing[ended]))
    assert all(process.is_alive for process in computing[remaining])
    assert [events[-1] for events in answers if not is_whole(events)] == []
    assert tiny_replicas(status) == before


@pytest.mark.ranks
async def test_another_number_of_ranks_drops_no_request_of_another_model(
    cluster: Product, mixture: Mixture, tmp_path: Path
) -> None:
    before = tiny_replicas(status_of(cluster))
    whole = write_config(tmp_path, mixture, ranks=1, gangs=1)
    async with Client(cluster) as client, asking(client, "tiny") as answers:
        await asyncio.to_thread(cluster.run, "apply", "--config", str(whole))
        status = await asyncio.to_thread(
            wait_for, cluster, lambda now: num_whole(now) == 0 and num_running(now, "llm-mixture") == 1
        )
        await client.until_answered("mixture")
    assert [events[-1] for events in answers if not is_whole(events)] == []
    assert tiny_replicas(status) == before


@pytest.mark.ranks
async def test_changed_code_reaches_the_replicas_on_every_node_and_drops_no_request(
    cluster: Product, mixture: Mixture, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    checkout = other_checkout(tmp_path / "checkout", noting(notes))
    file = write_config(tmp_path, mixture, ranks=1, gangs=1)  # as the test before this one left it
    command = [*APPLY, "--config", str(file)]
    before = status_of(cluster)
    async with Client(cluster) as client, asking(client, "tiny") as answers:
        await asyncio.to_thread(run, cluster.home, command, check=True, root=checkout)
        await client.until_answered("mixture")
    after = status_of(cluster)
    assert [events[-1] for events in answers if not is_whole(events)] == []
    for name in ("llm-tiny", "llm-mixture"):
        ran = {replica["pid"] for replica in replicas_of(before, name)}
        runs = {replica["pid"] for replica in replicas_of(after, name)}
        assert len(runs) == len(ran) and not runs & ran
        assert {f"ModelServer-{pid}" for pid in runs} <= {path.name for path in notes.iterdir()}
    assert len({replica["node"] for replica in replicas_of(after, "llm-tiny")}) == 2


@pytest.mark.ranks
def test_a_lost_node_is_shown_and_what_ran_there_runs_elsewhere(cluster: Product) -> None:
    status = status_of(cluster)
    address = sorted(node["address"] for node in status["nodes"])[-1]
    process_of_node(cluster, address).signal(signal.SIGKILL)
    status = wait_for(
        cluster,
        lambda now: (
            not next(node for node in now["nodes"] if node["address"] == address)["alive"]
            and num_running(now, "llm-tiny") == 2
            and num_running(now, "llm-mixture") == 1
        ),
    )
    assert "dead" in cluster.run("status").stdout
    nodes = {
        replica["node"]
        for application in status["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    }
    assert address not in nodes


def test_a_killed_head_of_ray_leaves_no_namespace_no_link_and_no_process(cluster: Product) -> None:
    """Nobody is left to stop vLLM's engines one by one, as happened above to the gang that was taken away."""
    tag = tag_of(cluster)
    assert bool(namespaces(tag)) == (why_no_network() is None)
    state = read_state(cluster.home / "run")
    assert state is not None
    ours = {*tagged(tag), *descendants(state.guardian_pid)}
    assert set(engines_of(cluster)) & ours
    (head,) = [process for process in ours if "gcs_server" in title(process).split(" ", 1)[0]]
    head.signal(signal.SIGKILL)
    assert state.guardian.wait(WAIT_S)
    assert [process for process in ours if process.is_alive] == []
    assert (namespaces(tag), interfaces(tag), tagged(tag)) == ([], [], [])
