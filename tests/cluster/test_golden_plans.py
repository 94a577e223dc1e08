"""The plans for well-known models on the example nodes stay as they are checked in.

After a wanted change: `WINDFARM_WRITE_GOLDEN=1 pytest tests/cluster/test_golden_plans.py`, then read the diff.
"""

import json
import os
from pathlib import Path

import pytest

from cluster.errors import PlanError
from cluster.expert_placement import PlanRequest, plan
from cluster.known_shapes import find_shape
from cluster.sizing import Workload
from cluster.topology import read_topology

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
NODES = ("one-gpu", "mixtral-2x4x40gb", "2x8xh100", "cpu-experts-4", "16-cpu")
MODELS = ("mistral-7b", "mixtral-8x7b", "llama-2-70b", "miqu-1-70b-q4")


def summary(nodes: str, model: str) -> dict[str, object]:
    """What matters of a plan, small enough to be read in a diff."""
    shape = find_shape(model)
    request = PlanRequest(shape, Workload(min(shape.max_context, 8192), 8), cores_per_rank=8)
    try:
        made = plan(read_topology(ROOT / "infra" / "nodes" / f"{nodes}.yaml"), request)
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


@pytest.mark.parametrize("nodes", NODES)
def test_plans_are_the_ones_checked_in(nodes: str) -> None:
    path = GOLDEN / f"{nodes}.json"
    plans = {model: summary(nodes, model) for model in MODELS}
    if os.environ.get("WINDFARM_WRITE_GOLDEN") == "1":
        path.write_text(json.dumps(plans, indent=1) + "\n")
    assert plans == json.loads(path.read_text())
