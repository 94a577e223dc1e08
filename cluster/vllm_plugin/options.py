"""What an engine tells the parts of the plugin: inside vLLM's own configuration (`additional_config`), or with one
request (`extra_args` of its sampling parameters)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEY = "windfarm"
WORKER_EXTENSION = "cluster.vllm_plugin.worker.WindfarmWorker"


def plugin_options(expert_placement: Any, count_experts: bool) -> dict[str, Any]:
    """`additional_config` for vLLM. `expert_placement[layer][expert]` is a rank; None places linearly."""
    return {_KEY: {"expert_placement": expert_placement, "count_experts": count_experts}}


def continued_arguments(num_tokens: int) -> dict[str, Any]:
    """`extra_args` of a request whose prompt ends with this many tokens of the answer."""
    return {_KEY: {"num_delivered_tokens": num_tokens}}


def num_delivered_tokens(sampling_params: Any) -> int:
    """Of a request as vLLM's scheduler has it; 0: its answer begins now."""
    arguments = getattr(sampling_params, "extra_args", None) or {}
    return int(arguments.get(_KEY, {}).get("num_delivered_tokens", 0))


def expert_ranks(config: Any, layer: int) -> list[int] | None:
    """The planned rank of each expert of this layer. `config` is a `VllmConfig`."""
    placement = _options(config).get("expert_placement")
    return None if placement is None else list(placement[layer])


def counts_experts(config: Any) -> bool:
    return bool(_options(config).get("count_experts"))


def _options(config: Any) -> Mapping[str, Any]:
    additional = config.additional_config
    return additional.get(_KEY, {}) if isinstance(additional, dict) else {}
