"""Commands reach a running windfarm over a socket that only its user may open; errors come back as errors."""

import stat
from pathlib import Path
from typing import Any

import pytest

from services.control import (
    MAX_RAY_FOLDER,
    ControlServer,
    RunState,
    ask,
    ray_folder_of,
    read_state,
    running_state,
    write_state,
)
from services.setup_errors import NotRunning, StartFailed


def handle(request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "fail":
        raise ValueError("no such thing")
    return {"echo": request}


def test_a_command_is_answered(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    server = ControlServer(path, handle)
    try:
        assert ask(path, {"do": "x", "text": "ü" * 100_000})["echo"]["text"] == "ü" * 100_000
        with pytest.raises(StartFailed, match="no such thing"):
            ask(path, {"do": "fail"})
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    finally:
        server.close()
    with pytest.raises(NotRunning):
        ask(path, {"do": "x"})


def test_a_state_whose_guardian_is_gone_is_not_running(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="windfarm up"):
        running_state(tmp_path)
    state = RunState("i", 2**22 - 1, 1, "c.sock", "0.0.0.0", 8000, "f", "r")
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert state.api == "http://127.0.0.1:8000"
    with pytest.raises(NotRunning):
        running_state(tmp_path)


def test_rays_folder_is_always_short_enough_for_sockets(tmp_path: Path) -> None:
    for home in (Path("/h"), tmp_path / ("long" * 20)):
        assert len(str(ray_folder_of(home))) <= MAX_RAY_FOLDER
