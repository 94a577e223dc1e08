"""Serve sees another version where the code is another one and only there; what cannot be rolled is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeDeploySchema

from cluster.home import Home, open_home
from services import code_change
from services.code_change import (
    LASTING,
    LOCKS,
    code_of,
    installed_packages,
    lasting_changes,
    read_locks,
    refuse_what_cannot_roll,
    with_code,
)
from services.code_copies import REPOSITORY, Sources, copies, keep_copy
from services.control import RunState
from services.process_environment import python_path
from services.ray_config import load_ray_config
from services.setup_errors import StartRefused

CONFIG = load_ray_config(REPOSITORY / "ray_config.yaml").serve
STEP = "services/migrations/versions/0001_first.py"
FILES = {"services/app.py": b"1", STEP: b"1", "services/conductor.py": b"1"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    root = tmp_path / "checkout"
    for name, content in {**FILES, **dict.fromkeys(LOCKS, b"ray==1\n")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return Sources(root, FILES)


@pytest.fixture
def state(home: Home, sources: Sources) -> RunState:
    """Of a windfarm that was started with these sources, in a shell that had a path of its own."""
    code = keep_copy(sources, home.run)
    return RunState(
        *("instance", 1, 1, "c.sock", "127.0.0.1", 8000, "f", "r"),
        code=sources.version,
        python_path=python_path(code, "/operators"),
        locks=read_locks(sources.root),
        packages=installed_packages(),
    )


def changed(sources: Sources, **files: bytes) -> Sources:
    return replace(sources, files={**sources.files, "services/app.py": b"2", **files})


def versions(config: Any) -> dict[str, str]:
    """What Serve compares."""
    return {app.name: get_app_code_version(app) for app in ServeDeploySchema.model_validate(config).applications}


def test_serve_sees_another_version_of_every_application_exactly_where_the_code_is_another_one(
    home: Home, sources: Sources, state: RunState
) -> None:
    before = versions(CONFIG)
    assert versions(with_code(CONFIG, sources, state)) == before
    second = with_code(CONFIG, changed(sources), state)
    after = versions(second)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert versions(with_code(CONFIG, changed(sources), state)) == after
    assert {code_of(app, state.code) for app in second["applications"]} == {changed(sources).version}
    assert {code_of(app, state.code) for app in CONFIG["applications"]} == {sources.version}


def test_processes_of_other_code_import_it_in_the_place_of_the_old_one(
    home: Home, sources: Sources, state: RunState
) -> None:
    other = changed(sources)
    config = {"applications": [{"name": "a", "runtime_env": {"env_vars": {"MINE": "1"}, "x": 1}}]}
    (app,) = with_code(config, other, state)["applications"]
    folder = copies(home.run) / other.version
    path = os.pathsep.join([str(folder), "/operators", str(folder / "services" / "startup")])
    assert app["runtime_env"] == {
        "env_vars": {"MINE": "1", "PYTHONPATH": path, "WINDFARM_CODE": other.version},
        "x": 1,
    }


def test_what_has_not_changed_or_can_be_rolled_is_not_refused(home: Home, sources: Sources, state: RunState) -> None:
    for code in (sources, changed(sources)):
        refuse_what_cannot_roll(state, code, home)


def test_packages_that_were_replaced_are_refused_and_new_ones_are_not(
    home: Home, sources: Sources, state: RunState, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = [*state.packages, "new-1.0"]
    monkeypatch.setattr(code_change, "installed_packages", lambda: added)
    refuse_what_cannot_roll(state, sources, home)
    monkeypatch.setattr(code_change, "installed_packages", lambda: added[1:])
    with pytest.raises(StartRefused, match=r"no longer those of the start: .*windfarm down, then make up"):
        refuse_what_cannot_roll(state, sources, home)


def test_code_that_pins_other_packages_is_refused(home: Home, sources: Sources, state: RunState) -> None:
    (sources.root / LOCKS[1]).write_bytes(b"ray==2\n")
    with pytest.raises(StartRefused, match=r"pins other packages.*windfarm down, then make up"):
        refuse_what_cannot_roll(state, changed(sources), home)


@pytest.mark.parametrize("is_newer", [True, False])
def test_code_with_another_schema_is_refused(home: Home, sources: Sources, state: RunState, is_newer: bool) -> None:
    other = changed(sources, **{STEP.replace("0001_first", "0002_more"): b""}) if is_newer else changed(sources)
    if not is_newer:
        other = replace(other, files={name: content for name, content in other.files.items() if name != STEP})
    step = "0002_more" if is_newer else "0001_first"
    with pytest.raises(StartRefused, match=rf"another database schema \({step}\.py\).*windfarm down, then make up"):
        refuse_what_cannot_roll(state, other, home)


def test_code_with_another_layout_of_the_data_folder_is_refused_before_it_is_changed(
    home: Home, sources: Sources, state: RunState
) -> None:
    (home.root / "version.json").write_text('{"version": 0}')
    with pytest.raises(StartRefused, match=r"layout of the data folder.*windfarm down, then make up"):
        refuse_what_cannot_roll(state, changed(sources), home)
    assert "0" in (home.root / "version.json").read_text()


def test_a_windfarm_whose_code_nobody_knows_is_left_alone(home: Home, sources: Sources, state: RunState) -> None:
    with pytest.raises(StartRefused, match=r"cannot change its code.*windfarm down, then make up"):
        refuse_what_cannot_roll(replace(state, code=""), sources, home)


def test_changes_that_lasting_processes_do_not_get_are_named(home: Home, sources: Sources, state: RunState) -> None:
    assert lasting_changes(state, changed(sources), home.run) == []
    other = changed(sources, **{"services/conductor.py": b"2"})
    assert lasting_changes(state, other, home.run) == ["services/conductor.py"]


def test_the_lasting_processes_import_what_is_named() -> None:
    roots = ["conductor", "guardian", "local_node", "limiter", "scaling_view", "ray_worker", "zone_scheduler"]
    code = f"import sys, {', '.join(f'services.{name}' for name in roots)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = {f"{name.replace('.', '/')}.py" for name in done.stdout.split()}
    assert set(LASTING) <= loaded
