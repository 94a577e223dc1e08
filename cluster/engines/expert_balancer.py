"""vLLM's own balancer of experts on GPUs (EPLB): what turns it on, and how many copies of experts it may place.

It moves experts and their copies between the ranks while the engine runs, by the load that it sees. So a plan tells it
only how many copies there is room for; where each of them lies is known to vLLM alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import PlanError

_SWITCH, _SETTINGS, _COPIES = "enable_eplb", "eplb_config", "num_redundant_experts"
# Whose classes have vLLM's protocol `MixtureOfExperts` (vLLM 0.29); asking vLLM itself would load all of it.
BALANCED_ARCHITECTURES = frozenset(
    {
        "AXK1ForCausalLM",
        "AfmoeForCausalLM",
        "DeepseekForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV4ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "FlexOlmoForCausalLM",
        "Gemma4ForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GlmMoeDsaForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "InternS1ProForConditionalGeneration",
        "InternS2MobiusForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "KimiLinearForCausalLM",
        "Lfm2MoeForCausalLM",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "MellumForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiMoV2ForCausalLM",
        "MistralLarge3ForCausalLM",
        "MixtralForCausalLM",
        "NemotronHForCausalLM",
        "NemotronHPuzzleForCausalLM",
        "PanguProMoEV2ForCausalLM",
        "PanguUltraMoEForCausalLM",
        "Param2MoEForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpForConditionalGeneration",
        "SarvamMLAForCausalLM",
        "Step3p5ForCausalLM",
    }
)


def balancer_options(num_redundant_experts: int, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The engine options that `given` become with the balancer on and so many copies in each layer.

    Raises `PlanError` where `given` turn the balancer off, or name another number of copies.
    """
    options = dict(given or {})
    settings = dict(options.get(_SETTINGS, {}))
    if options.get(_SWITCH, True) is not True or settings.get(_COPIES, num_redundant_experts) != num_redundant_experts:
        raise PlanError(
            f"The plan has vLLM balance the experts with {num_redundant_experts} copies in each layer, but "
            f"engine_options say {_SWITCH}: {options.get(_SWITCH, True)}, {_COPIES}: "
            f"{settings.get(_COPIES, num_redundant_experts)}. Leave them out, or set expert_placement: linear."
        )
    return options | {_SWITCH: True, _SETTINGS: settings | {_COPIES: num_redundant_experts}}


def check_balanced(model: str, architectures: Sequence[str]) -> None:
    """Refuse the balancer for a model whose class in vLLM cannot hand its experts over; raises `PlanError`."""
    if BALANCED_ARCHITECTURES.isdisjoint(architectures):
        raise PlanError(
            f"vLLM's balancer of experts does not know models of the kind {', '.join(architectures) or 'unknown'}, as "
            f"{model} is. Set expert_placement: linear and leave {_SWITCH} out."
        )


def is_balanced(options: Mapping[str, Any]) -> bool:
    """Whether these engine options turn the balancer on."""
    return options.get(_SWITCH) is True


def num_redundant_experts(options: Mapping[str, Any]) -> int:
    """Copies of experts in each layer beside the experts themselves; 0 where the balancer is off."""
    return int(dict(options.get(_SETTINGS, {})).get(_COPIES, 0)) if is_balanced(options) else 0
