"""The sparse model that end-to-end tests serve in gangs: its files, its section, and what it has to answer.

It is made of the first layers of the bundled model, so that a gang starts in seconds, and runs in float32, so that its
greedy answers are those of Transformers. Its experts are placed by a measured load that leaves no layer linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.expert_load import ExpertLoad
from cluster.home import open_home
from cluster.routing_trace import RoutingTrace, write_trace
from cluster.weights.prepare import prepare
from cluster.weights.safetensors_header import fingerprint
from cluster.weights.upcycle import MixtureRecipe, upcycle
from tests.expert_oracle import Reference, shortened
from tests.product import ROOT

LAYERS, EXPERTS = 2, 8
# The ids that would end an answer early.
FORBIDDEN = (0, 2)
# Tokens that chose two experts, layer by layer; most chose the same two.
CHOICES = (
    {(0, 1): 70, (2, 3): 12, (4, 5): 12, (6, 7): 12},
    {(6, 7): 70, (0, 1): 12, (2, 3): 12, (4, 5): 12},
)
# A gang of two ranks, twice; two replicas of the dense model.
SECTION = """
  - name: llm-mixture
    route_prefix: null
    import_path: services.app:build_model
    args: {{id: mixture, source: '{folder}', engine: vllm, max_context: 1024, parallel_requests: 8, \
engine_options: {{dtype: float32}}, data_parallel_size: {ranks}{more}}}
    deployments: [{{name: ModelServer, num_replicas: {replicas}}}]
"""
# Little enough that they and the ranks leave room for the embedding model on three nodes of a busy machine.
TINY_REPLICAS = "        num_replicas: 2\n        ray_actor_options: {num_cpus: 0.1, memory: 700000000}\n"
APART = "        max_replicas_per_node: 1\n"


@dataclass(frozen=True, slots=True)
class Mixture:
    """`trace` has the load that its experts are placed by."""

    checkpoint: Path
    trace: Path


def make_mixture(folder: Path) -> Mixture:
    dense = shortened(prepare("tiny", "hf", open_home()), folder / "dense", LAYERS)
    mixture = Mixture(folder / "mixture", folder / "trace.json")
    upcycle(dense, mixture.checkpoint, MixtureRecipe(variant="distinct"))
    write_trace(mixture.trace, RoutingTrace("mixture", fingerprint(mixture.checkpoint), uneven_load()))
    return mixture


def uneven_load() -> ExpertLoad:
    pairs = np.zeros((LAYERS, EXPERTS, EXPERTS), np.int64)
    for layer, choices in enumerate(CHOICES):
        for (first, second), count in choices.items():
            pairs[layer][np.ix_((first, second), (first, second))] = count
    tokens = np.einsum("lee->le", pairs).copy()
    return ExpertLoad(tokens, pairs, np.zeros_like(tokens), 1, 2, 0.0, 1.0)


def write_config(folder: Path, mixture: Mixture, *, ranks: int = 2, gangs: int = 2, dense_apart: bool = False) -> Path:
    """The configuration of the repository with this model, and with two replicas of the dense one: `dense_apart` never
    on one node, however few there are."""
    text = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")
    at = text.index("        num_replicas: 1")
    text = text[:at] + TINY_REPLICAS + (APART if dense_apart else "") + text[text.index("\n", at) + 1 :]
    more = f", expert_placement: planned, expert_trace: '{mixture.trace}'"
    if ranks == 1:
        more = ", memory_gib: 3"  # the estimate for whole models is more than a node here has
    section = SECTION.format(folder=mixture.checkpoint, ranks=ranks, replicas=ranks * gangs, more=more)
    file = folder / "gangs.yaml"
    file.write_text(text.replace("\n  - name: llm-tiny", section + "\n  - name: llm-tiny", 1), encoding="utf-8")
    return file


class Oracle:
    """What single-process Transformers answers in the mixture's place."""

    def __init__(self, mixture: Mixture) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(mixture.checkpoint)
        self._reference = Reference(mixture.checkpoint)

    def complete(self, prompt: str, max_tokens: int) -> str:
        """Greedy; the ids that would end it are forbidden."""
        ids = self._tokenizer(prompt, add_special_tokens=False).input_ids
        made = self._reference.continue_greedily(ids, max_tokens, FORBIDDEN)
        return str(self._tokenizer.decode(made, skip_special_tokens=True))
