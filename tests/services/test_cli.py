"""The command line is quick, explains itself, and turns our errors into one message."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.commands import app
from services.cli.knowledge import find_files

COMMANDS = [
    "up", "down", "apply", "status", "ingest", "ask", "chat", "key", "logs", "env", "doctor",
    "search", "collections", "documents", "reembed",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    answer = CliRunner().invoke(app, [command, "--help"])
    assert answer.exit_code == 0
    assert "--help" in answer.output


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom services.cli.commands import app\n"
        "print([m for m in ('ray', 'gradio', 'torch', 'sqlalchemy', 'httpx') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["status", "down", "apply"])
def test_without_a_windfarm_the_next_step_is_said(command: str, tmp_path: Path) -> None:
    answer = run(command, "--home", str(tmp_path))
    assert answer.returncode == 1
    assert answer.stderr.startswith("windfarm: No windfarm runs on")
    assert "Traceback" not in answer.stderr


def test_a_wrong_config_is_refused_by_up_apply_and_doctor(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    text = (Path(__file__).resolve().parents[2] / "ray_config.yaml").read_text(encoding="utf-8")
    config.write_text(text.replace("proxy_location:", "aplications: 1\nproxy_location:"), encoding="utf-8")
    for command in ("up", "apply", "doctor"):
        answer = run(command, "--home", str(tmp_path / "home"), "--config", str(config))
        assert answer.returncode == 1
        assert "unknown key `aplications`; did you mean `applications`?" in answer.stdout + answer.stderr


def test_key_prints_the_same_key_each_time(tmp_path: Path) -> None:
    first, second = run("key", "--home", str(tmp_path)), run("key", "--home", str(tmp_path))
    assert first.stdout.startswith("wf-")
    assert first.stdout == second.stdout


def test_env_prints_lines_for_a_shell(tmp_path: Path) -> None:
    answer = run("env", "--home", str(tmp_path))
    assert "export RAY_AUTH_MODE=token" in answer.stdout.splitlines()
    assert "WINDFARM_INSTANCE" not in answer.stdout


def test_folders_are_walked_and_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder in ("a/.git", "a/b"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a/one.txt", "a/b/one.txt", "a/.hidden", "a/.git/x", "two.md"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = list(find_files([tmp_path / "a", tmp_path / "two.md"]))
    assert [name for _, name in found] == ["b › one.txt", "one.txt", "two.md"]
