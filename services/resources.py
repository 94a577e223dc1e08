"""What one replica of each deployment asks Ray for, unless `deployments:` in the configuration says otherwise.

CPU shares place replicas and do not limit them: they are small, so that everything fits on two cores. Memory is what a
replica was measured to need at its peak, of a model what its engine takes, so that Ray never places more than the
machine can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from cluster.catalogue import resolve
from cluster.engines.choice import EngineChoice, choose_engine, detect_hardware, visible_devices
from cluster.engines.memory import DEFAULT_CONTEXT, VLLM_RUNTIME, context_of, llamacpp_bytes, vllm_bytes
from cluster.sizing import RankBytes
from cluster.weights.footprint import Footprint, footprint_of
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
    parts: str = ""
    """For people: what the memory is for, in GiB."""
    is_lower_bound: bool = False
    """Whether the model's files are not here, so that it may turn out to need more."""

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
DEVICES = Path("/dev")
# What the processes of one rank hold beside the model.
RANK_RUNTIME_BYTES = VLLM_RUNTIME


def count_gpus() -> int:
    """NVIDIA devices of this machine that this process may use, without loading any of their libraries."""
    if not detect_hardware().has_gpu:
        return 0
    present = len([path for path in DEVICES.glob("nvidia[0-9]*") if path.name[6:].isdecimal()])
    visible = visible_devices()
    if visible is None:
        return present
    return len(list(takewhile(lambda entry: not entry.isdecimal() or int(entry) < present, visible)))


def model_resources(config: ModelConfig, home: Path, *, ask_hub: bool = False) -> Resources:
    """Computed from the model's files; `memory_gib` wins. Raises `ClusterError` where the model cannot be served.

    `home` is the data folder. `ask_hub`: whether a hub may be asked about files that are not here yet.
    """
    resolved = resolve(config.source)
    choice = choose_engine(resolved, detect_hardware(), config.engine)
    if choice.engine == "remote":
        return REMOTE
    tensor = config.tensor_parallel_size
    num_cpus = rank_cpus(config) * tensor
    num_gpus = float(tensor) if choice.uses_gpu else 0.0
    if config.memory_gib is not None:
        return Resources(num_cpus, int(config.memory_gib * GIB) * tensor, num_gpus, parts="as memory_gib says")
    assert choice.model_format is not None, "models that are not remote have files"
    files = footprint_of(resolved, choice.model_format, home, ask_hub=ask_hub)
    context = context_of(config.id, config.max_context, files.cache.trained_context)
    needs = _replica_bytes(config, files, choice, context)
    parts = _parts(config, files, needs, context)
    return Resources(num_cpus, needs.total, num_gpus, parts=parts, is_lower_bound=not files.is_here)


def _replica_bytes(config: ModelConfig, files: Footprint, choice: EngineChoice, context: int | None) -> RankBytes:
    weights, slots = files.weight_bytes or 0, config.parallel_requests
    if config.num_ranks > 1:
        # The least that one replica of a gang needs, from the size of the weights; the plan knows the rest.
        runtime = RANK_RUNTIME_BYTES * config.tensor_parallel_size
        return RankBytes(weights // config.data_parallel_size, kv_cache=0, activations=0, runtime=runtime)
    if choice.engine == "llamacpp":
        return llamacpp_bytes(files.cache, weights=weights, context=context or DEFAULT_CONTEXT, num_slots=slots)
    dtype = config.engine_options.get("dtype")
    return vllm_bytes(
        files.cache,
        weights=weights,
        context=context,
        num_slots=slots,
        dtype=dtype,
        uses_gpu=choice.uses_gpu,
        shape=files.shape,
    )


def _parts(config: ModelConfig, files: Footprint, needs: RankBytes, context: int | None) -> str:
    weights = "weights of unknown size" if files.weight_bytes is None else f"weights {needs.weights / GIB:.1f}"
    engine = f"engine {(needs.runtime + needs.activations) / GIB:.1f}"
    if not needs.kv_cache:
        return f"{weights}, {engine}"
    of = f" for max_context {context} and parallel_requests {config.parallel_requests}" if context is not None else ""
    return f"{weights}, KV cache {needs.kv_cache / GIB:.1f}{of}, {engine}"


def rank_cpus(config: ModelConfig) -> float:
    """CPU share of one rank."""
    return RANK_CPUS if config.num_ranks > 1 else MODEL_CPUS
