"""What an engine tells the parts of the plugin, inside vLLM's own configuration (`additional_config`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEY = "windfarm"
WORKER_EXTENSION = "cluster.vllm_plugin.worker.WindfarmWorker"


def plugin_options(expert_placement: Any, count_experts: bool) -> dict[str, Any]:
    """`additional_config` for vLLM. `expert_placement[layer][expert]` is a rank; None places linearly."""
    return {_KEY: {"expert_placement": expert_placement, "count_experts": count_experts}}


def expert_ranks(config: Any, layer: int) -> list[int] | None:
    """The planned rank of each expert of this layer. `config` is a `VllmConfig`."""
    placement = _options(config).get("expert_placement")
    return None if placement is None else list(placement[layer])


def counts_experts(config: Any) -> bool:
    return bool(_options(config).get("count_experts"))


def _options(config: Any) -> Mapping[str, Any]:
    additional = config.additional_config
    return additional.get(_KEY, {}) if isinstance(additional, dict) else {}
