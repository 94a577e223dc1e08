"""Every process gets the same variables: secrets that only their owner can read, no telemetry, no foreign Ray."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.commands import app
from services.environment import SECRET_VARIABLE
from services.process_environment import (
    COMPILED,
    TOKEN_VARIABLE,
    full_environment,
    load_secrets,
    process_variables,
)
from services.processes import INSTANCE_VARIABLE, tagged
from services.ray_config import load_ray_config, parse_ray_config

FILE = Path(__file__).resolve().parents[2] / "ray_config.yaml"


def test_secrets_are_made_once_and_renewed_at_a_start(tmp_path: Path) -> None:
    first = load_secrets(tmp_path, renew=False)
    assert load_secrets(tmp_path, renew=False) == first
    renewed = load_secrets(tmp_path, renew=True)
    assert renewed.internal != first.internal
    assert renewed.ray_token != first.ray_token
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_nothing_reports_home(tmp_path: Path) -> None:
    variables = process_variables(tmp_path, load_secrets(tmp_path, renew=True), load_ray_config(FILE), {})
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert variables["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert variables["VLLM_NO_USAGE_STATS"] == "1"
    assert variables["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert variables["LANGSMITH_TRACING"] == "false"
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert variables["RAY_AUTH_MODE"] == "token"


def test_what_is_compiled_stays_in_the_data_folder_unless_the_caller_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in COMPILED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    variables = process_variables(tmp_path, load_secrets(tmp_path, renew=True), load_ray_config(FILE), {})
    assert variables["TRITON_CACHE_DIR"] == "/elsewhere"
    folders = {Path(variables[name]) for name in COMPILED if name != "TRITON_CACHE_DIR"}
    assert len(folders) == len(COMPILED) - 1
    assert all(folder.is_relative_to(tmp_path / "cache") for folder in folders)


def test_a_process_that_renames_itself_keeps_its_tag(tmp_path: Path) -> None:
    """As vLLM's processes do; `down` has nothing but tags and sessions to find them by when the guardian is gone."""
    pytest.importorskip("setproctitle")
    variables = process_variables(tmp_path, load_secrets(tmp_path, renew=True), load_ray_config(FILE), {})
    rename = "import setproctitle; setproctitle.setproctitle('VLLM::EngineCore'); print(flush=True); input()"
    environment = {**full_environment(variables), INSTANCE_VARIABLE: "renamed"}
    with subprocess.Popen(
        [sys.executable, "-c", rename], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert [process.pid for process in tagged("renamed")] == [child.pid]


def test_a_model_of_a_hub_may_be_fetched(tmp_path: Path) -> None:
    text = FILE.read_text(encoding="utf-8").replace("source: tiny ", "source: hf:owner/name ")
    config = parse_ray_config(text, FILE)
    assert "HF_HUB_OFFLINE" not in process_variables(tmp_path, load_secrets(tmp_path, renew=True), config, {})


def test_what_the_callers_shell_says_does_not_open_or_report_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    ours = process_variables(tmp_path, load_secrets(tmp_path, renew=True), load_ray_config(FILE), {})
    environment = full_environment(ours)
    assert (environment["RAY_USAGE_STATS_ENABLED"], environment["RAY_SERVE_ENABLE_HA_PROXY"]) == ("0", "0")


def test_another_ray_of_the_callers_shell_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_ADDRESS" not in full_environment({"A": "b"})


def test_secrets_are_new_for_each_start_and_stay_while_a_process_has_them(tmp_path: Path) -> None:
    def printed() -> dict[str, str]:
        answer = CliRunner().invoke(app, ["env", "--home", str(tmp_path), "--json"])
        assert answer.exit_code == 0, answer.output
        variables = json.loads(answer.stdout)
        return {name: variables[name] for name in (SECRET_VARIABLE, TOKEN_VARIABLE)}

    first, second = printed(), printed()
    assert set(first.values()).isdisjoint(second.values())
    running = subprocess.Popen(["sleep", "60"], env={**os.environ, **second})
    try:
        assert printed() == second
    finally:
        running.kill()
        running.wait()
    assert printed() != second
