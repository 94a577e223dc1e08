"""The expert observatory: from replicas and gangs to the endpoint, metrics, the terminal and a trace for plans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cluster.errors import LoadUnavailable
from cluster.expert_load import ExpertLoad
from cluster.routing_trace import read_trace
from services.cli.commands import app
from services.expert_counts import GangCounts, ModelExperts, experts_from_json, experts_json
from services.experts_view import picture, strongest_pairs
from services.gang import GangSeat
from services.model_service import ModelService
from tests.services.harness import SECRET, Running, ScriptedEngine, running_endpoint, words

NUM_LAYERS, NUM_EXPERTS = 2, 4


def load_of(*chosen: tuple[int, int], num_ranks: int = 1, since: float = 1000.0) -> ExpertLoad:
    """Counts of tokens that chose these two experts, the same in each layer."""
    pairs = np.zeros((NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS), np.int64)
    for one, two in chosen:
        pairs[:, [one, one, two, two], [one, two, one, two]] += 1
    return ExpertLoad(
        tokens=np.einsum("lee->le", pairs).copy(),
        pairs=pairs,
        rank_of=np.array([[expert * num_ranks // NUM_EXPERTS for expert in range(NUM_EXPERTS)]] * NUM_LAYERS),
        num_ranks=num_ranks,
        experts_per_token=2,
        since=since,
        until=since + 60,
    )


class CountingEngine(ScriptedEngine):
    """A scripted engine of a mixture; `answer` may also be an error to raise."""

    def __init__(self, load: ExpertLoad | Exception, *, model: str = "small", checkpoint: str = "f1") -> None:
        super().__init__(*words("a"), model=model)
        self.answer = load
        self.asked = asyncio.Semaphore(0)
        self.info = replace(self.info, checkpoint=checkpoint)

    async def expert_load(self) -> ExpertLoad | None:
        self.asked.release()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def wait_for_questions(self, number: int) -> None:
        """Until it was asked so many more times."""
        while not self.asked.locked():
            await self.asked.acquire()
        for _ in range(number):
            await asyncio.wait_for(self.asked.acquire(), 60)


async def add_gang(running: Running, name: str, *loads: ExpertLoad | Exception) -> None:
    for rank, load in enumerate(loads):
        service = ModelService(
            CountingEngine(load),
            SECRET,
            app="llm-small",
            replica_id=f"{name}{rank}",
            beats=running.beats,
            seat=GangSeat(name, rank, len(loads)),
        )
        await service.start()
        running.services.append(service)
    await running.directory.refresh()


async def ask(running: Running, **query: str) -> Any:
    answer = await running.http.get("/v1/cluster/experts", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_the_ranks_of_a_gang_and_the_replicas_of_a_model_add_up(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        one, two = load_of((0, 1), (0, 2), num_ranks=2), load_of((0, 1), num_ranks=2)
        await add_gang(running, "g", one, two)
        await add_gang(running, "h", load_of((2, 3), num_ranks=2), load_of(num_ranks=2))
        answer = await ask(running, model="small")
    assert answer["has_experts"] is True
    assert (answer["checkpoint"], answer["num_tokens"]) == ("f1", 4)
    assert answer["tokens"] == [[3, 2, 2, 1]] * NUM_LAYERS
    assert answer["pairs"][0] == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]]
    np.testing.assert_allclose(np.sum(answer["shares"], axis=1), 1.0, atol=1e-5)
    gangs = {gang["gang"]: gang for gang in answer["gangs"]}
    assert gangs["g"]["replicas"] == ["g0", "g1"]
    assert gangs["g"]["rank_tokens"] == [[5, 1]] * NUM_LAYERS
    assert gangs["g"]["mean_imbalance"] == pytest.approx(5 / 3, abs=1e-5)
    assert gangs["h"]["rank_tokens"] == [[0, 2]] * NUM_LAYERS
    assert answer["missing"] == []


async def test_what_has_no_experts_says_so_and_what_cannot_tell_says_why(tmp_path: Path) -> None:
    remote = CountingEngine(LoadUnavailable("It runs at a remote API."), model="far", checkpoint="")
    async with running_endpoint(tmp_path, ScriptedEngine(*words("a")), remote) as running:
        await add_gang(running, "g", load_of((0, 1)))
        entries = {entry["model"]: entry for entry in (await ask(running))["data"]}
        dense = await ask(running, model="tiny")
    assert dense == entries["tiny"]
    assert dense["has_experts"] is False
    assert dense["reason"] == "The model 'tiny' is dense: it has no experts."
    assert entries["far"]["has_experts"] is None
    assert entries["far"]["reason"] == "It runs at a remote API."
    assert entries["small"]["num_tokens"] == 1


async def test_a_rank_that_does_not_answer_is_named(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        await add_gang(running, "g", load_of((0, 1), num_ranks=2), LoadUnavailable("Its counters are off."))
        answer = await ask(running, model="small")
    assert answer["num_tokens"] == 1
    assert answer["missing"] == [{"replica": "g1", "reason": "Its counters are off."}]


async def test_replicas_of_two_checkpoints_are_never_added_up(tmp_path: Path) -> None:
    async with running_endpoint(
        tmp_path, CountingEngine(load_of((0, 1))), CountingEngine(load_of((0, 1)), checkpoint="f2")
    ) as running:
        answer = await running.http.get("/v1/cluster/experts", params={"model": "small"})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "model_changing"


async def test_only_the_owner_and_operators_may_look(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, CountingEngine(load_of((0, 1)))) as running:
        for role, status in (("member", 403), ("operator", 200)):
            user = running.accounts.create_user(role, role)
            key = running.accounts.create_key(user, "k")
            key = key if isinstance(key, str) else key.key
            headers = {"authorization": f"Bearer {key}"}
            answer = await running.http.get("/v1/cluster/experts", headers=headers)
            assert answer.status_code == status, answer.text
        assert (await running.http.get("/v1/cluster/experts", headers={"authorization": ""})).status_code == 401
        unknown = await running.http.get("/v1/cluster/experts", params={"model": "smal"})
        assert unknown.status_code == 404
        assert "There are: small." in unknown.json()["error"]["message"]


async def test_the_replicas_own_wire_needs_the_internal_secret(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, CountingEngine(load_of((0, 1)))) as running:
        (service,) = running.services
        assert (await running.http.get(f"{service.url}/experts")).status_code == 401
        told = await running.http.get(f"{service.url}/experts", headers={"x-windfarm-internal": SECRET})
    assert told.json()["load"]["tokens"] == [[1, 1, 0, 0]] * NUM_LAYERS


async def test_metrics_have_the_figures_of_each_rank_and_no_series_per_expert(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("a"))) as running:
        await add_gang(running, "g", load_of((0, 1), (0, 2), num_ranks=2), load_of(num_ranks=2))
        lines = (await running.http.get("/metrics")).text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if line.startswith("windfarm_expert"))
    assert {name: float(value) for name, value in figures.items()} == {
        'windfarm_expert_rank_tokens_total{gang="g",model="small",rank="0"}': 6.0,
        'windfarm_expert_rank_tokens_total{gang="g",model="small",rank="1"}': 2.0,
        'windfarm_expert_imbalance{gang="g",model="small"}': 1.5,
        'windfarm_expert_imbalance_worst{gang="g",model="small"}': 1.5,
    }


def test_the_json_of_the_endpoint_reads_back_as_it_was() -> None:
    experts = ModelExperts("small", True, "f1", (GangCounts("g", ("r0", "r1"), load_of((0, 1), num_ranks=2)),))
    again = experts_from_json(json.loads(json.dumps(experts_json(experts))))
    assert experts_json(again) == experts_json(experts)


def test_what_came_since_an_earlier_reading() -> None:
    first, later = load_of((0, 1)), load_of((0, 1), (2, 3))
    experts = [ModelExperts("small", True, "f1", (GangCounts("g", ("r0",), load),)) for load in (first, later)]
    assert experts[1].minus(experts[0]).total.tokens.tolist() == [[0, 0, 1, 1]] * NUM_LAYERS
    other = ModelExperts("small", True, "f1", (GangCounts("new", ("r0",), later),))
    assert other.minus(experts[0]).total.num_tokens == 2


def shown(experts: ModelExperts, *, width: int = 120) -> str:
    console = Console(width=width, no_color=True, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(picture(experts))
    return console.export_text()


def test_the_heat_map_shows_shares_ranks_and_experts_chosen_together() -> None:
    load = load_of((0, 1), (0, 1), (0, 2), (2, 3), num_ranks=2)
    text = shown(ModelExperts("small", True, "f1", (GangCounts("g", ("r0", "r1"), load),)))
    assert "small  2 layers of 4 experts, 2 per token; 4 tokens in 60 s" in text
    assert "38%  25%  25%  12%" in text.replace("  ", " ").replace(" ", "  ")
    assert "gang g" in text
    assert "62.5%" in text
    assert "busiest rank against the mean: 1.250" in text
    assert "layer 0: 2+3 25% (by chance " in text


def test_the_heat_map_fits_80_columns_and_many_experts() -> None:
    random = np.random.default_rng(0)
    hot = np.zeros((500, 64), np.int64)
    np.put_along_axis(hot, random.random((500, 64)).argsort(axis=1)[:, :6], 1, axis=1)
    pairs = np.stack([hot.T @ hot])
    load = ExpertLoad(np.einsum("lee->le", pairs).copy(), pairs, np.zeros((1, 64), np.int64), 1, 6, 0.0, 1.0)
    text = shown(ModelExperts("wide", True, "f", (GangCounts("r", ("r",), load),)), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert any(shade in text for shade in "▒▓█")


async def test_where_vllm_moves_experts_between_ranks_no_rank_is_named(tmp_path: Path) -> None:
    load = replace(load_of((0, 1), (0, 2)), is_balanced=True)
    text = shown(ModelExperts("small", True, "f1", (GangCounts("g", ("r0",), load),)))
    assert "vLLM moves its experts between the ranks" in text
    assert "busiest rank" not in text
    async with running_endpoint(tmp_path, ScriptedEngine(*words("a"))) as running:
        await add_gang(running, "g", load, replace(load_of(), is_balanced=True))
        answer = await ask(running, model="small")
        scraped = (await running.http.get("/metrics")).text.splitlines()
    (gang,) = answer["gangs"]
    assert (answer["num_tokens"], gang["is_balanced"], gang["mean_imbalance"]) == (2, True, None)
    assert (gang["rank_tokens"], gang["imbalance"]) == ([[]] * NUM_LAYERS, [])
    assert experts_from_json(answer).total.is_balanced
    assert not [line for line in scraped if line.startswith("windfarm_expert")]


def test_a_model_that_saw_no_token_says_so() -> None:
    assert "No token has gone through it yet" in shown(ModelExperts("m", True, "f", (GangCounts("r", (), load_of()),)))


def test_pairs_beyond_chance_come_first() -> None:
    (strongest,) = strongest_pairs(load_of((0, 1), (0, 1), (2, 3), (2, 3)), 1)
    assert strongest.experts in ((0, 1), (2, 3))
    assert strongest.share == 0.5
    assert strongest.by_chance == pytest.approx(0.5 / 3)


def test_popular_experts_that_meet_by_chance_stand_out_little() -> None:
    """Popularity alone decides: a table of products with an empty diagonal, drawn many times."""
    popular = np.outer([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0])
    one, two = np.triu_indices(4, 1)
    drawn = np.random.default_rng(0).multinomial(50_000, popular[one, two] / popular[one, two].sum())
    chosen = [pair for pair, number in zip(zip(one, two, strict=True), drawn, strict=True) for _ in range(number)]
    for pair in strongest_pairs(load_of(*chosen), 12):
        assert abs(pair.share - pair.by_chance) < 0.01


async def command(running: Running, *arguments: str) -> Result:
    asked = ["experts", *arguments, "--api", running.url, "--key", running.key]
    return await asyncio.to_thread(CliRunner().invoke, app, asked, env={"COLUMNS": "120"})


async def test_the_command_shows_saves_and_prints(tmp_path: Path) -> None:
    load = load_of((0, 1), (0, 2), num_ranks=2)
    async with running_endpoint(tmp_path, ScriptedEngine(*words("a"))) as running:
        nothing = await command(running)
        await add_gang(running, "g", load, load_of(num_ranks=2))
        drawn = await command(running)
        printed = await command(running, "small", "--json", "--save", str(tmp_path / "t.json"))
        dense = await command(running, "tiny")
    assert "No model that runs here has experts. The model 'tiny' is dense" in str(nothing.exception)
    assert "2 tokens in 60 s" in drawn.stdout
    assert json.loads(printed.stdout)["num_tokens"] == 2
    trace = read_trace(tmp_path / "t.json")
    assert (trace.model, trace.checkpoint, trace.load.tokens.tolist()) == ("small", "f1", load.tokens.tolist())
    assert "windfarm plan" in printed.stderr
    assert "is dense: it has no experts" in str(dense.exception)


async def test_watching_shows_what_comes_and_saves_that_window(tmp_path: Path) -> None:
    engine = CountingEngine(load_of((0, 1)))
    async with running_endpoint(tmp_path, engine) as running:
        asked = [sys.executable, "-m", "services.cli", "experts", "small", "--watch", "--every", "0.2"]
        asked += ["--save", str(tmp_path / "t.json"), "--api", running.url, "--key", running.key]
        process = await asyncio.create_subprocess_exec(*asked, stdout=asyncio.subprocess.PIPE)
        try:
            assert process.stdout is not None
            await engine.wait_for_questions(2)
            engine.answer = load_of((0, 1), (2, 3))
            await engine.wait_for_questions(2)
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.communicate(), 30)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0
    assert read_trace(tmp_path / "t.json").load.tokens.tolist() == [[0, 0, 1, 1]] * NUM_LAYERS


def test_help_names_what_it_can() -> None:
    text = CliRunner().invoke(app, ["experts", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert all(option in text for option in ("--save", "--watch", "--json"))
