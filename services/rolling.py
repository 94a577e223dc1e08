"""`apply`: brings changed configuration and changed code to a running windfarm, without a failed request.

Applications that get other code are replaced one after the other, the endpoint last: a fault in the code takes one of
them and not all, and their starts do not share the cores. What has not changed goes on.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.home import Home, explain_disk_errors, open_home
from services.code_change import code_of, lasting_changes, refuse_what_cannot_roll, with_code
from services.code_copies import keep_copy, read_sources, remove_other_copies
from services.control import RunState, ask, running_state
from services.node_layout import Say, running_topology
from services.preflight import check_models, explain
from services.process_environment import uses_hub
from services.ray_config import FIXED_NAMES, RayConfig
from services.setup_errors import StartFailed, StartRefused
from services.supervisor import POLL_S, Prepare, Show, plan_where_needed, refuse_failed

Config = Mapping[str, Any]
_ENDPOINT = next(path for path, name in FIXED_NAMES.items() if name == "platform")
GO_ON = "What comes after it was not changed. Correct the code or the file, or go back, and run `windfarm apply` again."


def apply(
    home: Path, config: RayConfig, say: Say, show: Show, timeout_s: float, prepare_models: Prepare
) -> dict[str, Any]:
    """Bring this configuration and the code of this process to the windfarm that runs here; returns when both have
    taken effect. `timeout_s` is for each application that is replaced in its turn."""
    state = running_state(home / "run")
    with _only_one(home):
        sources = read_sources()
        refuse_what_cannot_roll(state, sources, Home(home))
        _refuse_unless_possible(state, home, config, prepare_models)
        applied = ask(state.control, {"do": "applied"})["config"]
        with explain_disk_errors(home):
            keep_copy(sources, home / "run")
        in_use = {code_of(app, state.code) for app in applied["applications"]}
        remove_other_copies(home / "run", in_use | {state.code, sources.version})
        wanted = with_code(config.serve, sources, state)
        for line in describe(applied, wanted, state.code):
            say(line)
        if lasting := lasting_changes(state, sources, home / "run"):
            say(f"What changed in {', '.join(lasting)} also runs where nothing is replaced: there with the next `up`.")
        for step in steps(applied, wanted):
            ask(state.control, {"do": "apply", "config": step}, timeout_s=60)
            try:
                status = _wait(state, home, config, show, timeout_s)
            except StartFailed as error:
                raise StartFailed(f"{error}\n{GO_ON}") from error
        return status


def steps(applied: Config, wanted: Config) -> Iterator[dict[str, Any]]:
    """The Serve configs to submit one after the other, each when the one before has taken effect; the last is whole.

    With the first comes all that changes beside the code, but for the endpoint.
    """
    before = {app["name"]: app for app in applied["applications"]}
    held = _held(before, wanted)
    while True:
        apps = [before[app["name"]] if app["name"] in held else app for app in wanted["applications"]]
        yield {**wanted, "applications": apps}
        if not held:
            return
        held = held[1:]


def _held(before: Mapping[str, Any], wanted: Config) -> list[str]:
    """Names of the applications that come after the first step, in their turn. The endpoint is the last of several that
    change, in whatever: a new one has not seen the others before their change, and would refuse where it should wait.
    """
    held = _by_code(before, wanted)[1:]
    changed = [app for app in wanted["applications"] if before.get(app["name"], app) != app]
    endpoint = [app["name"] for app in changed if app["import_path"] == _ENDPOINT]
    return held if len(changed) == 1 else [name for name in held if name not in endpoint] + endpoint


def _by_code(before: Mapping[str, Any], wanted: Config) -> list[str]:
    """Names of the applications that get other code, in their turn."""
    changed = [
        app
        for app in wanted["applications"]
        if app["name"] in before and code_of(app, "") != code_of(before[app["name"]], "")
    ]
    return [app["name"] for app in sorted(changed, key=lambda app: app["import_path"] == _ENDPOINT)]


def describe(applied: Config, wanted: Config, start: str) -> Iterator[str]:
    """What is replaced and why, in a line each."""
    before, after = ({app["name"]: app for app in config["applications"]} for config in (applied, wanted))
    replaced = _by_code(before, wanted)
    if replaced:
        old, new = code_of(before[replaced[0]], start), code_of(after[replaced[0]], start)
        yield f"Code changed ({old} to {new}): {_count(replaced)}, one after the other: {', '.join(replaced)}"
    edited = [name for name in after if name in before and _section(before[name]) != _section(after[name])]
    for what, names in (
        ("Configuration changed", edited),
        ("New", [name for name in after if name not in before]),
        ("Removed", [name for name in before if name not in after]),
    ):
        if names:
            yield f"{what}: {', '.join(names)}"
    if before == after:
        yield "Neither code nor configuration has changed: nothing restarts."


def _section(app: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in app.items() if key != "runtime_env"}


def _count(names: Collection[str]) -> str:
    return "1 application" if len(names) == 1 else f"{len(names)} applications"


def _refuse_unless_possible(state: RunState, home: Path, config: RayConfig, prepare_models: Prepare) -> None:
    findings = [*check_models(config, home)]
    if not all(finding.is_ok for finding in findings):
        raise StartRefused(explain(findings))
    if uses_hub(config) and not state.may_use_hub:
        raise StartRefused(
            "This windfarm was started without a model of a hub, so its processes may not go to the network. "
            "Restart it with this configuration: windfarm down, then windfarm up."
        )
    if uses_hub(config):
        prepare_models(config, open_home(home))  # what its replicas ask Ray for is computed from the files
    running = ask(state.control, {"do": "status"})
    plan_where_needed(config, open_home(home), lambda: running_topology(running))


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Two at once would take turns in bringing their own."""
    descriptor = os.open(home / "run" / "apply.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartRefused("Another `windfarm apply` is under way here. Wait for its end.") from None
        yield
    finally:
        os.close(descriptor)


def _wait(state: RunState, home: Path, config: RayConfig, show: Show, timeout_s: float) -> dict[str, Any]:
    """Until every application runs; returns the status."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        now = ask(state.control, {"do": "status"})
        show(now)
        refuse_failed(now)
        is_running = all(app["status"] == "RUNNING" for app in now["applications"].values())
        if is_running and _serves(state.api, home, config.app.models):
            return now
        time.sleep(POLL_S)
    raise StartFailed(f"Not all applications run after {timeout_s:.0f} s. `windfarm status` says what is missing.")


def _serves(api: str, home: Path, models: Collection[str]) -> bool:
    """Whether the public endpoint, which looks every few seconds, has seen which models there are now and that each can
    be asked: otherwise the next request could be told that there is no such model, or that it is not ready."""
    from services.accounts import read_owner_key

    key = read_owner_key(home)
    if key is None:
        return True
    try:
        answer = httpx.get(
            f"{api}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=5, trust_env=False
        ).raise_for_status()
    except httpx.HTTPError:
        return False
    listed = [model for model in answer.json()["data"] if model["kind"] == "chat"]
    return {model["id"] for model in listed} == set(models) and all(model["ready"] for model in listed)
