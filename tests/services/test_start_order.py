"""What can run on the head alone is placed before anything else may fill it."""

from typing import Any

from services.ray_status import summarize
from services.start_order import is_placed, submissions

CONFIG: dict[str, Any] = {
    "proxy_location": "Disabled",
    "applications": [{"name": name} for name in ("llm-mixture", "embed", "store", "platform")],
}


def status(**replicas: list[dict[str, Any]]) -> dict[str, Any]:
    """As the conductor tells it of applications with one deployment each."""
    details = {
        "applications": {
            name: {"status": "DEPLOYING", "deployments": {"D": {"status": "UPDATING", "replicas": listed}}}
            for name, listed in replicas.items()
        }
    }
    return summarize(details, [], {"CPU": 4.0, "memory": 2.0**34})


def replica(state: str, pid: int | None) -> dict[str, Any]:
    return {"replica_id": "r", "state": state, "pid": pid}


def test_one_node_gets_everything_at_once_and_several_the_heads_part_first() -> None:
    assert list(submissions(CONFIG, 1)) == [CONFIG]
    first, whole = submissions(CONFIG, 3)
    assert [app["name"] for app in first["applications"]] == ["store", "platform"]
    assert first["proxy_location"] == "Disabled"
    assert whole == CONFIG


def test_placed_means_that_every_replica_has_a_process() -> None:
    first = next(submissions(CONFIG, 2))
    running, waiting = [replica("STARTING", 7)], [replica("STARTING", None)]
    assert not is_placed(first, status())
    assert not is_placed(first, status(store=running))
    assert not is_placed(first, status(store=running, platform=[]))
    assert not is_placed(first, status(store=running, platform=waiting))
    assert is_placed(first, status(store=running, platform=running))
    assert is_placed(first, status(store=running, platform=running, embed=waiting))
