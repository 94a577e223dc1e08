"""Small mixtures and engines that spread their experts, for the tests of real ranks.

The checkpoints are the first layers of the bundled model and mixtures made of them, so that engines start quickly.
"""

import importlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.engines.parallelism import Parallelism
from cluster.engines.settings import EngineSettings
from tests.engine_process import Replica

LAYERS, EXPERTS, ANSWER = 3, 8, 12
WINDOW = 48
# Experts of each layer in no order that vLLM could choose itself.
PLACEMENT = ((1, 0, 0, 1, 1, 0, 1, 0), (0, 1, 1, 1, 0, 0, 0, 1), (1, 1, 0, 0, 1, 0, 0, 1))


def prompts(number: int, length: int) -> list[list[int]]:
    source = random.Random(length)
    return [[source.randrange(200, 40_000) for _ in range(length + index)] for index in range(number)]


SHORT = prompts(6, 9)


def engine(folder: Path, parallelism: Parallelism, **options: Any) -> Replica:
    """In a process of its own, eager and in float32 unless `options` say otherwise."""
    settings = EngineSettings(
        "m",
        folder,
        max_context=256,
        parallel_requests=8,
        threads=parallelism.tensor_parallel_size,
        options={"dtype": "float32", **options},
        parallelism=parallelism,
    )
    return Replica(settings, folder.parent / "engine.log", {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})


def files_of_packages(_worker: object, names: Sequence[str]) -> list[str]:
    """Called in a worker: which files it imports under these names."""
    return [str(importlib.import_module(name).__file__) for name in names]


def assert_pairs_exact(replica: Replica) -> None:
    """What the ranks computed of each expert is what the routers sent to it, rows that fill batches included."""
    counts, held = replica.ask("windfarm_expert_counts"), replica.ask("windfarm_held_experts")
    tensor = len(counts) // len(replica.engines)
    routers = counts[::tensor]  # the tensor-parallel ranks of an engine all see its tokens
    routed = sum(np.einsum("lee->le", np.array(router["together"])) + np.array(router["filling"]) for router in routers)
    for rank, count in enumerate(counts):
        computed = np.array(count["computed"])
        for layer, experts in enumerate(held[rank]):
            assert computed[layer, experts].tolist() == routed[layer, experts].tolist()
            assert computed[layer].sum() == routed[layer, experts].sum(), "pairs of experts that it does not hold"
    assert sum(np.sum(count["computed"]) for count in counts) == routed.sum()
