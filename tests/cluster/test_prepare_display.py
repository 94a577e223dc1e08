"""What is shown while models are prepared: a bar each on a terminal, nothing elsewhere."""

import re
import threading
from pathlib import Path

import huggingface_hub
import pytest

from cluster.catalogue import Format, resolve
from cluster.home import Home, open_home
from cluster.weights import __main__ as command
from cluster.weights import hub
from cluster.weights.hub import fetch_from_hub
from cluster.weights.recipes import Report


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")  # a bar is as long as it is full; with colours it only changes its colour
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")


def prepare_as_far_as(monkeypatch: pytest.MonkeyPatch, home: Path, *steps: tuple[str, float]) -> None:
    """Two models, of which each only gets as far as its step."""
    ways = iter(steps)

    def prepare(_source: str, _format: Format, _home: Home, report: Report) -> None:
        report("reading", 0.05)
        report(*next(ways))

    monkeypatch.setattr(command, "prepare", prepare)
    command.prepare_all([("tiny", "gguf"), ("embed", "hf")], open_home(home))


def test_a_terminal_shows_a_bar_for_each_model_as_long_as_it_has_come(
    terminal: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_as_far_as(monkeypatch, tmp_path, ("ready", 1.0), ("converting", 0.25))
    out, err = capsys.readouterr()
    assert out == ""
    *_, tiny, embed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err).strip().splitlines()
    assert re.match(r"tiny/gguf +━{40} ready +\d:\d\d:\d\d", tiny)
    assert re.match(r"embed/hf +━{10}[^━]+ converting +\d:\d\d:\d\d", embed)


def test_elsewhere_nothing_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    prepare_as_far_as(monkeypatch, tmp_path, ("ready", 1.0), ("ready", 1.0))
    assert capsys.readouterr() == ("", "")


def test_a_model_of_a_hub_comes_as_many_bytes_as_lie_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, float] = {}
    is_half = threading.Event()
    blobs = tmp_path / "models" / "hub" / "models--owner--name" / "blobs"

    def report(step: str, fraction: float) -> None:
        told[step] = fraction
        if fraction == 0.5:
            is_half.set()

    def download(_repository: str, **_options: object) -> str:
        blobs.mkdir(parents=True)
        for name, num_bytes in (("whole", 200_000_000), ("half.incomplete", 300_000_000)):
            with (blobs / name).open("wb") as file:
                file.truncate(num_bytes)
        assert is_half.wait(30)
        (blobs / "config.json").touch()
        (blobs / "model.safetensors").touch()
        return str(blobs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "ask_weight_bytes", lambda _: 1_000_000_000)
    monkeypatch.setattr(hub, "_LOOK_S", 0.01)
    fetch_from_hub(resolve("hf:owner/name"), open_home(tmp_path), report)
    assert told["fetching owner/name: 0.50 of 1.00 GB"] == 0.5
    assert list(told.items())[-1] == ("ready", 1.0)
    assert not huggingface_hub.utils.are_progress_bars_disabled()
