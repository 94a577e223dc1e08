"""What `windfarm apply` submits and says: other code goes to one application after the other, the endpoint last."""

from pathlib import Path
from typing import Any

import pytest

from services.code_change import code_of
from services.rolling import _only_one, describe, steps
from services.setup_errors import StartRefused

NAMES = {"platform": "services.app:build_platform", "llm-tiny": "services.app:build_model"}
NAMES |= {"store": "services.app:build_store"}


def config(code: str | None, *names: str, **args: int) -> dict[str, Any]:
    """Applications with this code (None: that of the start); `args` by application, with _ for -."""
    environment = {"runtime_env": {"env_vars": {"WINDFARM_CODE": code, "PYTHONPATH": f"/{code}"}}} if code else {}
    apps = [
        {"name": name, "import_path": NAMES[name], "args": {"n": args.get(name.replace("-", "_"), 0)}, **environment}
        for name in names or NAMES
    ]
    return {"proxy_location": "Disabled", "applications": apps}


def shown(step: dict[str, Any]) -> dict[str, str]:
    return {app["name"]: f"{code_of(app, 'start')} {app['args']['n']}" for app in step["applications"]}


def test_other_code_goes_to_one_application_after_the_other_and_the_endpoint_is_last() -> None:
    submitted = list(steps(config(None), config("new")))
    assert [shown(step) for step in submitted] == [
        {"platform": "start 0", "llm-tiny": "new 0", "store": "start 0"},
        {"platform": "start 0", "llm-tiny": "new 0", "store": "new 0"},
        {"platform": "new 0", "llm-tiny": "new 0", "store": "new 0"},
    ]
    assert submitted[-1] == config("new")
    assert submitted[0]["proxy_location"] == "Disabled"


def test_an_apply_that_was_broken_off_goes_on_where_it_was() -> None:
    half = list(steps(config("old"), config("new")))[1]
    assert list(steps(half, config("new"))) == [config("new")]
    back = [shown(step) for step in steps(half, config("old"))]
    assert back == [
        {"platform": "old 0", "llm-tiny": "old 0", "store": "new 0"},
        {"platform": "old 0", "llm-tiny": "old 0", "store": "old 0"},
    ]


def test_a_changed_configuration_comes_at_once_and_with_other_code_in_its_turn() -> None:
    for edited in (config(None, store=1, llm_tiny=1), config(None, platform=1)):
        assert list(steps(config(None), edited)) == [edited]
    first, *_, last = steps(config(None), config("new", store=1))
    assert shown(first) == {"platform": "start 0", "llm-tiny": "new 0", "store": "start 0"}
    assert last == config("new", store=1)


def test_the_endpoint_is_the_last_of_several_whose_configuration_changes() -> None:
    edited = config(None, store=1, llm_tiny=1, platform=1)
    first, last = steps(config(None), edited)
    assert shown(first) == {"platform": "start 0", "llm-tiny": "start 1", "store": "start 1"}
    assert last == edited
    almost = list(steps(config("old"), config("new")))[1]
    first, last = steps(almost, config("new", store=1))
    assert shown(first) == {"platform": "old 0", "llm-tiny": "new 0", "store": "new 1"}
    assert last == config("new", store=1)


def test_applications_come_with_the_first_step_and_go_with_it() -> None:
    (only,) = steps(config(None, "store", "platform"), config("new", "llm-tiny", "platform"))
    assert shown(only) == {"llm-tiny": "new 0", "platform": "new 0"}
    first, _ = steps(config(None, "store", "platform"), config("new"))
    assert shown(first) == {"platform": "start 0", "llm-tiny": "new 0", "store": "new 0"}


def test_what_is_replaced_is_said_with_the_reason() -> None:
    assert list(describe(config(None), config("new"), "start")) == [
        "Code changed (start to new): 3 applications, one after the other: llm-tiny, store, platform"
    ]
    assert list(describe(config("a", "store"), config("a", "llm-tiny"), "start")) == ["New: llm-tiny", "Removed: store"]
    assert list(describe(config(None), config(None, store=2), "start")) == ["Configuration changed: store"]
    (nothing,) = describe(config("a"), config("a"), "start")
    assert "nothing restarts" in nothing


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with _only_one(tmp_path), pytest.raises(StartRefused, match="under way"), _only_one(tmp_path):
        raise AssertionError("must not be reached")
    with _only_one(tmp_path):
        pass
