"""The policy that Ray Serve's controller asks for the number of a model's replicas; it is named in `ray_config.yaml`.

Serve stores this module by value with the configuration, so it holds no more than the class; what it decides with is
imported where it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class ScaleByNeed:
    """One for each model. `goals` are the fields of `ScalingGoals`."""

    def __init__(self, **goals: float) -> None:
        from cluster.autoscaling import ScalingGoals

        self._goals = ScalingGoals(**goals)
        self._view: Any = None

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas wanted now; delays, bounds and whole gangs are added by Serve. Called ten times a second."""
        if self._view is None:
            from services.beats import RayBeatStore
            from services.scaling_view import ScalingView

            assert context.app_name is not None, "every deployment belongs to an application"
            self._view = ScalingView(self._goals, context.app_name, RayBeatStore())
        wanted = self._view.replicas_wanted(context.target_num_replicas, context.capacity_adjusted_max_replicas)
        return float(wanted), {}
