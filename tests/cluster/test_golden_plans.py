"""The plans for well-known models on the example nodes stay as they are checked in, and so do those of the manifests.

After a wanted change: `WINDFARM_WRITE_GOLDEN=1 pytest tests/cluster/test_golden_plans.py`, then read the diff.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import PlanError
from cluster.expert_placement import plan_with_fitting_context
from cluster.known_shapes import find_shape
from cluster.plan import NODE_MEMORY_SHARE
from cluster.sizing import Workload
from cluster.topology import read_topology
from infra.kuberay.check import FOLDER
from infra.kuberay.write import command_of
from services.cli.commands import app
from services.sharding import request_on_ray

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
NODES = ("one-gpu", "mixtral-2x4x40gb", "2x8xh100", "cpu-experts-4", "16-cpu")
MANIFESTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MODELS = ("mistral-7b", "mixtral-8x7b", "llama-2-70b", "miqu-1-70b-q4")


def summary(nodes: str, model: str) -> dict[str, object]:
    """What matters of a plan, small enough to be read in a diff."""
    shape = find_shape(model)
    asked = request_on_ray(shape, Workload(min(shape.max_context, 8192), 8))
    request = replace(asked, node_memory_share=NODE_MEMORY_SHARE)
    try:
        made, _ = plan_with_fitting_context(read_topology(ROOT / "infra" / "nodes" / f"{nodes}.yaml"), request)
    except PlanError as error:
        return {"refused": str(error).splitlines()}
    parallel = made.parallel
    return {
        "tensor x pipeline x data": [parallel.tensor, parallel.pipeline, parallel.data],
        "ranks": [
            {
                "node": rank.node,
                "accelerator": rank.accelerator,
                "experts": list(rank.experts[0]) if rank.experts else None,
                "bytes": rank.needs.total,
                "free": rank.free,
            }
            for rank in made.replicas[0].ranks
        ],
        "free_slots": dict(made.free_slots),
        "reasons": list(made.reasons),
    }


def plan_behind(manifest: str) -> dict[str, Any]:
    """What the command of a manifest plans, without its last step."""
    command = command_of(FOLDER / f"{manifest}.yaml")
    emit = command.index("--emit")
    made = CliRunner().invoke(app, [*command[:emit], "--json", *command[emit + 2 :]])
    assert made.exit_code == 0, made.output
    plan: dict[str, Any] = json.loads(made.stdout)
    for replica in plan["replicas"]:
        for rank in replica["ranks"]:
            layers = rank.pop("experts")
            rank["experts"] = layers[0] if layers else None
            assert all(layer == rank["experts"] for layer in layers), "placed linearly"
    return plan


def check(name: str, found: object) -> None:
    path = GOLDEN / f"{name}.json"
    if os.environ.get("WINDFARM_WRITE_GOLDEN") == "1":
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(path.read_text())


@pytest.mark.parametrize("nodes", NODES)
def test_plans_are_the_ones_checked_in(nodes: str) -> None:
    check(nodes, {model: summary(nodes, model) for model in MODELS})


def test_the_plans_behind_the_manifests_are_the_ones_checked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert MANIFESTS == ["cpu-experts-4", "mixtral-2x4x40gb", "one-gpu"]
    check("manifests", {manifest: plan_behind(manifest) for manifest in MANIFESTS})


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_no_plan_has_stages_that_windfarm_cannot_start(path: Path) -> None:
    for model in json.loads(path.read_text()).values():
        if "parallel" in model:
            assert model["parallel"]["pipeline"] == 1
        elif "refused" not in model:
            assert model["tensor x pipeline x data"][1] == 1
