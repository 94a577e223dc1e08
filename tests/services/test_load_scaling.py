"""Serve's autoscaler follows what the engines run and hold, within its own delays and bounds."""

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.schema import DeploymentSchema

from services.load_scaling import METRIC, load_stats, scale_by_load


def context(loads: dict[str, float], replicas: int, target: float) -> AutoscalingContext:
    """What Serve hands to a policy, of which only these parts matter here."""
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="ModelServer",
        app_name="llm-tiny",
        current_num_replicas=replicas,
        target_num_replicas=replicas,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=lambda: {METRIC: loads} if loads else {},
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(min_replicas=1, max_replicas=8, target_ongoing_requests=target),
    )


def test_running_and_waiting_requests_count_alike() -> None:
    assert load_stats((3, 2)) == {METRIC: 5.0}


@pytest.mark.parametrize(
    ("loads", "replicas", "wanted"),
    [
        ({"a": 12.0}, 1, 2.0),
        ({"a": 6.0, "b": 6.0}, 2, 2.0),
        ({"a": 0.0, "b": 3.0}, 2, 0.5),
        ({"a": 12.0}, 2, 4.0),  # the second replica has not reported yet: it counts like the first
    ],
)
def test_each_replica_is_kept_at_the_target(loads: dict[str, float], replicas: int, wanted: float) -> None:
    assert scale_by_load(context(loads, replicas, target=6.0)) == (wanted, {})


def test_without_any_report_nothing_changes() -> None:
    assert scale_by_load(context({}, 3, target=6.0)) == (3.0, {})


def test_serve_finds_the_policy_by_its_name() -> None:
    name = f"{scale_by_load.__module__}:{scale_by_load.__name__}"
    policy = {"policy_function": name}
    DeploymentSchema(name="ModelServer", autoscaling_config={"min_replicas": 1, "max_replicas": 2, "policy": policy})
    assert name == "services.load_scaling:scale_by_load"
