"""Status in plain words: what runs, what waits, and which resource it waits for."""

import pytest

from services.cli.status_view import render
from services.cli.up_display import describe
from services.ray_status import explain_wait, summarize

GIB = 2**30
CODES = {"llm-a": "aa", "embed": "aa", "store": "bb"}


def details(state: str, pid: int | None, status: str = "DEPLOYING") -> dict[str, object]:
    deployment = {
        "status": "UPDATING",
        "message": "",
        "target_num_replicas": 1,
        "deployment_config": {"ray_actor_options": {"num_cpus": 1.0, "memory": 2 * GIB}},
        "replicas": [{"replica_id": "r1", "state": state, "pid": pid, "node_ip": "127.0.0.1"}],
    }
    return {"applications": {"llm-a": {"status": status, "message": "", "deployments": {"ModelServer": deployment}}}}


def test_a_replica_that_waits_for_memory_says_so() -> None:
    status = summarize(details("STARTING", None), [], {"CPU": 2.0, "memory": 1 * GIB})
    assert status["pending"][0]["application"] == "llm-a"
    assert "needs 2.0 GiB memory, only 1.0 GiB memory free" in status["pending"][0]["reason"]


def test_a_replica_that_waits_for_a_cpu_says_so() -> None:
    assert "needs 1 CPU, only 0.5 CPU free" in explain_wait({"num_cpus": 1}, {"CPU": 0.5})


def test_a_replica_with_a_process_is_not_pending() -> None:
    assert summarize(details("STARTING", 77), [], {"CPU": 0.0})["pending"] == []


def test_people_see_what_is_pending_and_why() -> None:
    status = {"phase": "ready", **summarize(details("STARTING", None), [], {"CPU": 0.0})}
    assert describe(status)["llm-a"].startswith("ModelServer is pending: needs 1 CPU")


def test_the_printed_status_says_what_is_pending_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    status = summarize(details("STARTING", None), [], {"CPU": 2.0, "memory": 1 * GIB})
    render({"api": "http://127.0.0.1:8000", "is_ready": True, "phase": "ready", **status})
    shown = " ".join(capsys.readouterr().out.split())  # lines are cut where the terminal ends
    assert "pending: llm-a/ModelServer (1): needs 2.0 GiB memory, only 1.0 GiB memory free: give it less" in shown


def test_people_see_what_is_ready() -> None:
    status = {"phase": "ready", **summarize(details("RUNNING", 77, "RUNNING"), [], {})}
    assert describe(status) == {"ray": "ready", "llm-a": "ready"}


def test_a_change_of_code_that_was_broken_off_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    apps = {name: {"status": "RUNNING", "message": "", "deployments": {}, "code": code} for name, code in CODES.items()}
    status = {**summarize({}, [], {}), "applications": apps}
    render({"api": "http://127.0.0.1:8000", "is_ready": True, "phase": "ready", **status})
    shown = " ".join(capsys.readouterr().out.split())
    assert "code: aa llm-a, embed; bb store. `windfarm apply`" in shown
    for app in apps.values():
        app["code"] = "bb"
    render({"api": "http://127.0.0.1:8000", "is_ready": True, "phase": "ready", **status})
    assert "code:" not in capsys.readouterr().out
