"""What one replica of each deployment asks Ray for, unless `deployments:` in the configuration says otherwise.

CPU shares place replicas and do not limit them: they are small, so that everything fits on two cores. Memory is what a
replica was measured to need at its peak, so that Ray never places more than the machine can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.catalogue import ResolvedModel, resolve
from cluster.engines.choice import choose_engine, detect_hardware
from services.config import ModelConfig

GIB = 2**30
MIB = 2**20
# Ray gives one of it to the head node alone; Serve's own controller is placed by it too.
HEAD_MARK = "node:__internal_head__"


@dataclass(frozen=True, slots=True)
class Resources:
    num_cpus: float
    memory: int
    num_gpus: float = 0.0
    is_on_head: bool = False
    """Only on the machine where windfarm was started: what it owns lies in the data folder there."""

    def actor_options(self) -> dict[str, Any]:
        """As Ray wants it."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "memory": self.memory}
        if self.num_gpus:
            options["num_gpus"] = self.num_gpus
        if self.is_on_head:
            options["resources"] = {HEAD_MARK: 0.001}
        return options


STORE = Resources(num_cpus=0.2, memory=800 * MIB, is_on_head=True)
EMBEDDING = Resources(num_cpus=0.3, memory=1200 * MIB)
# The public port is opened on the machine where windfarm was started.
GATEWAY = Resources(num_cpus=0.2, memory=500 * MIB, is_on_head=True)
# HAProxy and the process that tells it of the relays.
BALANCER = Resources(num_cpus=0.1, memory=200 * MIB, is_on_head=True)
PAGE = Resources(num_cpus=0.1, memory=400 * MIB, is_on_head=True)

MODEL_CPUS = 0.5
# A rank of a model that is cut into several: two of them fit beside everything else on two cores.
RANK_CPUS = 0.3
REMOTE = Resources(num_cpus=0.1, memory=300 * MIB)
# Python with the engine's libraries, without weights.
_PROCESS_BYTES = {"llamacpp": 500 * MIB, "vllm": 2 * GIB}
# What the processes of one rank hold beside the model.
RANK_RUNTIME_BYTES = _PROCESS_BYTES["vllm"]
# Key-value cache, scratch space of the computation.
_WORK_BYTES = {"llamacpp": 800 * MIB, "vllm": 4 * GIB}


def count_gpus() -> int:
    """NVIDIA devices of this machine that this process may use, without loading any of their libraries."""
    if not detect_hardware().has_gpu:
        return 0
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()])


def model_resources(config: ModelConfig) -> Resources:
    """Computed from the model's files; `memory_gib` wins. Raises `ClusterError` where the model cannot be served."""
    resolved = resolve(config.source)
    choice = choose_engine(resolved, detect_hardware(), config.engine)
    if choice.engine == "remote":
        return REMOTE
    if config.num_ranks > 1:
        return _rank_resources(config, resolved, uses_gpu=choice.uses_gpu)
    memory = _PROCESS_BYTES[choice.engine] + _WORK_BYTES[choice.engine]
    memory += int(1.2 * _weight_bytes(resolved, choice.engine))
    if config.memory_gib is not None:
        memory = int(config.memory_gib * GIB)
    return Resources(MODEL_CPUS, memory, num_gpus=1.0 if choice.uses_gpu else 0.0)


def _rank_resources(config: ModelConfig, resolved: ResolvedModel, *, uses_gpu: bool) -> Resources:
    """The least that one replica of a gang needs, from the size of the weights; the plan knows the rest."""
    tensor = config.tensor_parallel_size
    memory = RANK_RUNTIME_BYTES * tensor + _weight_bytes(resolved, "vllm") // config.data_parallel_size
    if config.memory_gib is not None:
        memory = int(config.memory_gib * GIB) * tensor
    return Resources(rank_cpus(config) * tensor, memory, num_gpus=float(tensor) if uses_gpu else 0.0)


def rank_cpus(config: ModelConfig) -> float:
    """CPU share of one rank."""
    return RANK_CPUS if config.num_ranks > 1 else MODEL_CPUS


def _weight_bytes(resolved: ResolvedModel, engine: str) -> int:
    if engine == "vllm" and resolved.entry is not None:
        return 2 * resolved.entry.num_parameters
    return resolved.num_bytes or 0
