"""What an engine may ask its worker processes: mixed into vLLM's worker class, called by `collective_rpc`."""

from __future__ import annotations

from typing import Any

import cluster.vllm_plugin
from cluster.vllm_plugin.expert_counters import counts


class WindfarmWorker:
    """Answers are plain lists and numbers, so that they cross process borders without trust."""

    vllm_config: Any
    model_runner: Any

    def windfarm_parts(self) -> list[str]:
        """Names of the plugin's parts that are on in this worker."""
        return list(cluster.vllm_plugin.parts)

    def windfarm_expert_counts(self) -> dict[str, Any]:
        """Counts since the last reset, by layer; see `ExpertCounts` for their meaning."""
        counts.end_step()
        names = ("together", "filling", "computed")
        return {"since": counts.since} | {name: getattr(counts, name).long().tolist() for name in names}

    def windfarm_reset_expert_counts(self) -> None:
        counts.reset()

    def windfarm_held_experts(self) -> list[list[int]]:
        """The experts whose weights this worker holds, per layer, in the order of their local ids."""
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        modules = [module for module in self.model_runner.model.modules() if isinstance(module, RoutedExperts)]
        held = []
        for module in modules:
            expert_map = module.expert_map
            if expert_map is None:
                held.append(list(range(module.global_num_experts)))
                continue
            here = [expert for expert in range(module.global_num_experts) if expert_map[expert] >= 0]
            held.append(sorted(here, key=lambda expert: int(expert_map[expert])))
        return held
