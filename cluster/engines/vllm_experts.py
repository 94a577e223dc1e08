"""The mixture-of-experts side of the vLLM engine: what it asks of the plugin, and the counts that it reads back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.engines.parallelism import Parallelism
from cluster.errors import ClusterError, LoadUnavailable
from cluster.expert_load import ExpertLoad
from cluster.vllm_plugin.options import WORKER_EXTENSION, plugin_options
from cluster.vllm_plugin.versions import check_version

_NEEDED_PARTS = {"cpu_collectives", "cpu_experts", "placed_experts", "expert_counters"}


def num_experts(config: Mapping[str, Any]) -> int:
    """From a checkpoint's config.json; 0 for a dense model."""
    return int(config.get("num_local_experts") or config.get("n_routed_experts") or config.get("num_experts") or 0)


def needs_plugin(parallelism: Parallelism) -> bool:
    """Whether vLLM's own CPU code cannot do it."""
    return parallelism.enable_expert_parallel or parallelism.data_parallel_size > 1 or parallelism.count_experts


def expert_options(parallelism: Parallelism, *, is_cpu: bool) -> dict[str, Any]:
    """Fields of vLLM's `EngineArgs`, for a model with experts. Raises `ClusterError` for what cannot be had here."""
    if not is_cpu:
        if parallelism.expert_placement is not None:
            raise ClusterError("Experts are placed singly only on CPU; on GPUs vLLM's balancer does it (enable_eplb).")
        return {"enable_return_routed_experts": True} if parallelism.count_experts else {}
    if not needs_plugin(parallelism):
        return {}
    check_version("Expert parallelism")
    return {
        "worker_extension_cls": WORKER_EXTENSION,
        "additional_config": plugin_options(parallelism.expert_placement, parallelism.count_experts),
    }


async def check_parts(engine: Any) -> None:
    """Raises `ClusterError` where a worker of this running engine lacks parts of the plugin."""
    for parts in await engine.collective_rpc("windfarm_parts"):
        if missing := _NEEDED_PARTS - set(parts):
            raise ClusterError(
                f"windfarm's vLLM plugin is not whole in vLLM's workers ({', '.join(sorted(missing))} missing). Is "
                "VLLM_PLUGINS set without windfarm, or windfarm not installed in this environment? Run make setup."
            )


async def check_held_experts(engine: Any, parallelism: Parallelism, config: Mapping[str, Any]) -> None:
    """Raises `ClusterError` where a worker of this running engine holds other experts than it was told to, so that what
    is said of ranks is true of them."""
    experts = num_experts(config)
    if not experts or not parallelism.enable_expert_parallel:
        return
    told = parallelism.expert_ranks(int(config["num_hidden_layers"]), experts)
    first = parallelism.data_parallel_rank * parallelism.tensor_parallel_size
    for rank, held in enumerate(await engine.collective_rpc("windfarm_held_experts"), first):
        if parallelism.expert_placement is not None and len(held) != len(told):
            raise ClusterError(
                f"Rank {rank} has {len(held)} layers with experts, but they were placed for {len(told)}. Plan again."
            )
        for layer, (here, owners) in enumerate(zip(held, told, strict=False)):  # some models begin with dense layers
            wanted = [expert for expert, owner in enumerate(owners) if owner == rank]
            if here != wanted:
                raise ClusterError(
                    f"Rank {rank} holds the experts {here} of layer {layer}, but {wanted} were placed there, so "
                    "nothing that is said of its experts would be true. Try expert_placement: linear, and report it."
                )


async def read_worker_counts(engine: Any, parallelism: Parallelism, config: Mapping[str, Any]) -> ExpertLoad:
    """What the workers of one engine counted. All its workers see the same tokens, so the first one's word is taken."""
    counts = (await engine.collective_rpc("windfarm_expert_counts"))[0]
    together = np.array(counts["together"], np.int64)
    if not together.size:
        raise LoadUnavailable(
            "vLLM's CPU experts for this checkpoint's quantization are not counted; only plain ones are."
        )
    return _load(together, parallelism, config, counts["since"])


class OutputCounts:
    """Counts on GPUs, from the experts that vLLM reports with each finished answer.

    An answer's last token goes through no layer, and requests that end early are not counted. vLLM also reports the
    experts of what it had in its prefix cache; that was computed for an earlier request and counts once. It names
    experts whatever copy of them computed a token; where its balancer is on, nobody can say which rank that was.
    """

    def __init__(self, parallelism: Parallelism, config: Mapping[str, Any], *, is_balanced: bool = False) -> None:
        self._parallelism = parallelism
        self._config = config
        self._is_balanced = is_balanced
        self._since = time.time()
        experts = num_experts(config)
        self._together = np.zeros((int(config["num_hidden_layers"]), experts, experts), np.int64)

    def note(self, routed: np.ndarray[Any, Any], num_cached: int = 0) -> None:
        """`routed` is [tokens, layers, experts per token]; the first `num_cached` tokens were not computed anew."""
        routed = routed[num_cached:]
        num_tokens, num_layers, _ = routed.shape
        chosen = np.zeros((num_layers, num_tokens, self._together.shape[1]), np.float32)
        np.put_along_axis(chosen, routed.transpose(1, 0, 2).astype(np.int64), 1.0, axis=2)
        self._together += np.rint(chosen.transpose(0, 2, 1) @ chosen).astype(np.int64)

    def load(self) -> ExpertLoad:
        return _load(self._together.copy(), self._parallelism, self._config, self._since, is_balanced=self._is_balanced)


def _load(
    together: np.ndarray[Any, np.dtype[np.int64]],
    parallelism: Parallelism,
    config: Mapping[str, Any],
    since: float,
    *,
    is_balanced: bool = False,
) -> ExpertLoad:
    layers, experts, _ = together.shape
    rank_of = np.zeros((layers, experts)) if is_balanced else parallelism.expert_ranks(layers, experts)
    is_gang = parallelism.data_parallel_size > 1
    return ExpertLoad(
        tokens=np.einsum("lee->le", together).copy(),
        pairs=together,
        rank_of=np.array(rank_of, np.int64),
        num_ranks=1 if is_balanced else parallelism.num_expert_ranks,
        experts_per_token=int(config["num_experts_per_tok"]),
        since=since,
        until=time.time(),
        gang=f"{parallelism.data_parallel_address}:{parallelism.data_parallel_rpc_port}" if is_gang else "",
        is_balanced=is_balanced,
    )
