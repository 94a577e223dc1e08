"""`windfarm plan`: by measured load, judged on another trace, as a table and as data, and refusals by name."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from cluster.expert_load import ExpertLoad
from cluster.known_shapes import KNOWN_SHAPES
from cluster.routing_trace import RoutingTrace, write_trace
from services.cli.commands import app

SHAPE = KNOWN_SHAPES["small"]
WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
NODES = Path(__file__).parents[2] / "infra" / "nodes"


def record(path: Path, seed: int, *, model: str = "small", checkpoint: str = "") -> Path:
    """A trace of 4000 tokens; experts are as popular in one as in the next, the tokens are others."""
    pairs = np.zeros((SHAPE.num_layers, 8, 8), np.int64)
    random = np.random.default_rng(seed)
    for layer in range(SHAPE.num_layers):
        popularity = np.random.default_rng(layer).dirichlet(np.full(8, 2.0))
        chosen = np.argsort(np.log(popularity) + random.gumbel(size=(4000, 8)), axis=1)[:, -2:]
        hot = np.zeros((4000, 8), np.int64)
        np.put_along_axis(hot, chosen, 1, axis=1)
        pairs[layer] = hot.T @ hot
    tokens = np.einsum("lee->le", pairs).copy()
    rank_of = np.zeros((SHAPE.num_layers, 8), np.int64)
    write_trace(path, RoutingTrace(model, checkpoint, ExpertLoad(tokens, pairs, rank_of, 1, 2, 0.0, 60.0)))
    return path


def run(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env=WIDE | {"WINDFARM_HOME": str(home)})


def test_experts_are_placed_by_one_trace_and_judged_by_another(tmp_path: Path) -> None:
    first, second = record(tmp_path / "a.json", 1), record(tmp_path / "b.json", 2)
    nodes = str(NODES / "cpu-experts-4.yaml")
    asked = ["small", "--nodes", nodes, "--data", "4", "--load", str(first), "--judge", str(second)]
    made = json.loads(run(tmp_path, *asked, "--json").stdout)
    balance = made["balance"]
    assert balance["bound"] <= balance["planned"] < balance["linear"]
    assert balance["planned"] < 1.02 * balance["bound"]
    held = [rank["experts"][0] for rank in made["replicas"][0]["ranks"]]
    assert sorted(expert for experts in held for expert in experts) == list(range(8))
    shown = " ".join(run(tmp_path, *asked).stdout.split())  # where lines break depends on the length of the paths
    assert f"linear {balance['linear']:.3f}, this plan {balance['planned']:.3f}" in shown
    assert f"{balance['bound']:.3f} that no placement can beat" in shown
    assert "judged by" in shown


def test_a_load_that_decides_nothing_is_said(tmp_path: Path) -> None:
    first = record(tmp_path / "a.json", 1)
    asked = ["small", "--nodes", str(NODES / "cpu-experts-4.yaml"), "--load", str(first)]
    shown = run(tmp_path, *asked).stdout
    assert "each rank holds all experts. --data N spreads them" in shown
    assert "no placement can beat" not in shown
    assert json.loads(run(tmp_path, *asked, "--json").stdout)["balance"] is None


def test_the_readmes_command_places_by_one_trace_and_judges_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (NODES.parents[1] / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in readme.splitlines() if line.startswith("windfarm plan small "))
    (tmp_path / "infra").symlink_to(NODES.parent)
    monkeypatch.chdir(tmp_path)
    for seed, day in enumerate(("monday", "tuesday")):
        record(Path(f"{day}.json"), seed)
    shown = " ".join(run(tmp_path, *shlex.split(line)[2:]).stdout.split())
    assert "small: 1 x 4 ranks" in shown
    assert "Experts are assigned by measured load." in shown
    assert "Busiest rank against the mean, judged by tuesday.json: linear" in shown


def test_on_gpus_it_says_which_experts_to_copy(tmp_path: Path) -> None:
    trace = record(tmp_path / "a.json", 1)
    asked = ["small", "--nodes", str(NODES / "mixtral-2x4x40gb.yaml"), "--data", "4", "--load", str(trace)]
    made = json.loads(run(tmp_path, *asked, "--redundant", "4", "--json").stdout)
    assert made["copied_experts"]
    assert {len(rank["experts"][0]) for rank in made["replicas"][0]["ranks"]} == {3}
    assert "Experts with copies, and in how many layers" in run(tmp_path, *asked, "--redundant", "4").stdout


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    other = record(tmp_path / "o.json", 1, model="other")
    answer = run(tmp_path, "small", "--nodes", str(NODES / "cpu-experts-4.yaml"), "--load", str(other))
    assert answer.exit_code != 0
    assert "of the model 'other', not 'small'" in str(answer.exception)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    answer = run(tmp_path, "small", "--nodes", str(NODES / "cpu-experts-4.yaml"), "--load", str(tmp_path / "t.json"))
    assert "is no routing trace" in str(answer.exception)


def test_copies_need_a_trace_and_gpus(tmp_path: Path) -> None:
    trace = record(tmp_path / "a.json", 1)
    cpus = ["small", "--nodes", str(NODES / "cpu-experts-4.yaml"), "--data", "4", "--redundant", "4"]
    assert "give a routing trace" in str(run(tmp_path, *cpus).exception)
    assert "Redundant experts need GPUs" in str(run(tmp_path, *cpus, "--load", str(trace)).exception)


@pytest.mark.parametrize("ranks", ["16", "3"])
def test_ranks_that_cannot_hold_the_experts_are_refused(tmp_path: Path, ranks: str) -> None:
    answer = run(tmp_path, "small", "--nodes", str(NODES / "16-cpu.yaml"), "--data", ranks)
    assert answer.exit_code != 0
    assert "8 experts" in str(answer.exception)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tensor", "3", "3 tensor-parallel ranks and the 4 key-value heads of small do not divide each other"),
        ("--tensor", "-2", "At least one tensor-parallel rank is needed, not -2"),
        ("--data", "0", "At least one data-parallel rank is needed, not 0"),
        ("--context", "0", "At least one token of context is needed, not 0"),
        ("--sequences", "-8", "At least one sequence is needed, not -8"),
        ("--cores-per-rank", "0", "A rank needs a share of a core above 0, not 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, option: str, value: str, message: str) -> None:
    answer = run(tmp_path, "small", "--nodes", str(NODES / "16-cpu.yaml"), option, value)
    assert message in str(answer.exception)


def test_the_picture_is_the_drawing_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    asked = ["mixtral-8x7b", "--nodes", str(NODES / "mixtral-2x4x40gb.yaml"), "--replicas", "2"]
    for name in ("a.svg", "b.svg"):
        assert run(tmp_path, *asked, "--svg", str(tmp_path / name)).exit_code == 0
    drawn = (tmp_path / "a.svg").read_text()
    words = "".join(ElementTree.fromstring(drawn).itertext()).replace("\xa0", " ")
    assert "mixtral-8x7b: 2 x 4 ranks" in words
    assert "gpu-b (4 x A100-40G" in words
    assert "url(http" not in drawn
    without_place = [(tmp_path / name).read_text().replace(name, "") for name in ("a.svg", "b.svg")]
    assert without_place[0] == without_place[1]


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    answer = run(tmp_path, "small", "--nodes", str(NODES / "16-cpu.yaml"), "--svg", str(tmp_path / "no" / "a.svg"))
    assert "cannot be written" in str(answer.exception)


def test_the_readmes_picture_is_what_the_command_draws_today(tmp_path: Path) -> None:
    """After a wanted change: `make screenshots`."""
    asked = ["mixtral-8x7b", "--nodes", "infra/nodes/mixtral-2x4x40gb.yaml", "--replicas", "2"]
    assert run(tmp_path, *asked, "--svg", str(tmp_path / "plan.svg")).exit_code == 0
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn == (NODES.parent / "images" / "plan.svg").read_text()
