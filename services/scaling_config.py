"""How a model's number of replicas may change: `autoscaling_config` of its deployment in `ray_config.yaml`.

The keys are Ray Serve's own; those that mean nothing here (Serve counts no requests of a model) are left out, so they
are refused. Values that Serve gives by itself have its defaults.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field

from cluster.autoscaling import ScalingGoals
from services.config import Section

SCALING_POLICY = "services.scaling:ScaleByNeed"

_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]
_DEFAULT = ScalingGoals()


class Goals(Section):
    """`policy_kwargs`; see `ScalingGoals`."""

    first_token_target_s: _Positive = _DEFAULT.first_token_target_s
    late_share: _Share = _DEFAULT.late_share
    slot_use: _Positive = _DEFAULT.slot_use
    cache_use: _Share = _DEFAULT.cache_use
    down_share: _Share = _DEFAULT.down_share


class Policy(Section):
    policy_function: Literal["services.scaling:ScaleByNeed"]
    policy_kwargs: Goals = Goals()


class ModelScaling(Section):
    """Replicas of a model between two bounds; of gangs: ranks, in whole gangs."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """0: the model is ended when nobody uses it, and started by the next request, which waits."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    initial_replicas: Annotated[int, Field(ge=0)] | None = None
    """After a start; none: `min_replicas`."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600
    downscale_to_zero_delay_s: Annotated[float, Field(ge=0)] | None = None
    """From the last copy to none; none: `downscale_delay_s`."""
    policy: Policy

    @property
    def first_replicas(self) -> int:
        """After a start."""
        return self.min_replicas if self.initial_replicas is None else self.initial_replicas

    def problems(self, gang_size: int) -> list[tuple[str, str]]:
        """Key and message of what does not fit together."""
        found = []
        if self.max_replicas < self.min_replicas:
            found.append(("max_replicas", f"it is below min_replicas ({self.min_replicas})"))
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            found.append(("initial_replicas", f"it is not within {self.min_replicas} and {self.max_replicas}"))
        for name in ("min_replicas", "max_replicas", "initial_replicas"):
            value = getattr(self, name)
            if value is not None and value % gang_size:
                found.append((name, f"{value} is no multiple of {gang_size}: each rank of a gang is a replica"))
        return found


assert set(Goals.model_fields) == {field.name for field in fields(ScalingGoals)}, "both say the same"
