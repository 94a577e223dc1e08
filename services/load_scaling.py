"""How many replicas a model needs, by what its engines run and hold: a policy for Ray Serve's autoscaling.

Generations reach a replica through its own listener, so Serve counts no requests for it; the replicas report
themselves (`record_autoscaling_stats`). Delays, bounds and whole gangs are Serve's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

METRIC = "requests"
"""Generations that a replica runs or holds in its queue."""


def load_stats(load: tuple[int, int]) -> dict[str, float]:
    """What a replica reports of its engine's running and queued requests."""
    return {METRIC: float(sum(load))}


def scale_by_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """As many replicas as keep each at `target_ongoing_requests`; the present number while no replica has reported."""
    reported = (context.aggregated_metrics or {}).get(METRIC, {})
    if not reported:
        return float(context.target_num_replicas), {}
    # A replica that has not reported yet is one that just started: it gets the load of the others.
    mean = sum(reported.values()) / len(reported)
    assert context.config is not None, "Serve always gives the configuration"
    return mean * context.current_num_replicas / context.config.get_target_ongoing_requests(), {}
