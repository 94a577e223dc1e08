"""The image: what it copies is enough to run, its steps are set-up's own, and it runs as nobody special."""

import fnmatch
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.setup import image
from infra.setup.checks import SetupProblem
from infra.setup.install import Environment
from infra.setup.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Instructions and their text, lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def copied() -> Iterator[tuple[str, str]]:
    """Pairs of a path in the repository and its path in the image."""
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                yield source, source if target == "./" else target


def test_everything_that_is_copied_is_in_the_repository_and_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    for source, _ in copied():
        assert (ROOT / source).exists(), source
        assert source in let_in, f".dockerignore keeps {source} out"
        assert source.split("/")[0] in let_in
    tracked = subprocess.run(
        ["git", "ls-files", "tests", "infra"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept_out = [line for line in ignored if not line.startswith(("!", "#", "**"))]
    assert "*" in kept_out
    assert any(fnmatch.fnmatch("infra/kuberay", line) for line in kept_out)
    assert tracked.stdout


def test_what_is_copied_is_enough_to_run(tmp_path: Path) -> None:
    """Command line, applications and deployments are imported from a folder that holds what the image holds."""
    for source, target in copied():
        place = tmp_path / target
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, place)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import infra.setup.image, services.app, services.cli.commands, services.gateway, services.model_server
foreign = [name for name, module in list(sys.modules.items())
           if name.split('.')[0] in ('cluster', 'services', 'rag', 'ui')
           and getattr(module, '__file__', None) and not module.__file__.startswith({str(tmp_path)!r})]
print(foreign)
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_packages_are_installed_by_set_up_from_the_locks_alone() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    runs = [rest for word, rest in instructions() if word == "RUN"]
    assert [rest.split("python3 ")[1] for rest in runs if "python3 " in rest] == [
        "-m infra.setup.image packages",
        "-m infra.setup.image project",
    ]
    assert "pip install" not in text
    assert "curl" not in text


def test_it_runs_as_an_ordinary_user_without_models_and_secrets() -> None:
    users = [rest for word, rest in instructions() if word == "USER"]
    assert users == ["1000:1000"]
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("CMD")
    for word, rest in instructions():
        if word == "ENV":
            assert not any(part in rest for part in ("SECRET", "TOKEN", "KEY", "PASSWORD"))


def test_there_is_a_stage_for_each_profile_and_the_cpu_image_shows_no_gpu() -> None:
    stages = {rest.split(" AS ")[1]: rest.split(" AS ")[0] for word, rest in instructions() if word == "FROM"}
    assert stages["windfarm"] == "${PROFILE}"
    assert {stages["cpu"], stages["gpu"]} == {"system"}
    variables = [rest for word, rest in instructions() if word == "ENV" and "NVIDIA_VISIBLE_DEVICES" in rest]
    assert len(variables) == 1
    assert variables[0].startswith("PROFILE=gpu")


class Recorded(Environment):
    """Does nothing, and remembers in which order it was asked."""

    def __init__(self) -> None:
        super().__init__(ROOT, lambda text: None)
        self.steps: list[tuple[str, object]] = []

    def create(self, python: str) -> None:
        self.steps.append(("create", python))

    def install_torch_for_cpu(self, pin: str) -> bool:
        self.steps.append(("torch", pin.split("==")[0]))
        return True

    def install_lock(self, names: object) -> None:
        self.steps.append(("lock", names))

    def compile(self, packages: object) -> None:
        self.steps.append(("compile", packages))

    def compile_all(self) -> None:
        self.steps.append(("compile all", None))

    def install_project(self) -> None:
        self.steps.append(("project", None))


@pytest.mark.parametrize(("profile", "has_torch_first"), [("cpu", True), ("gpu", False), ("base", False)])
def test_the_layer_of_packages_is_made_as_on_a_machine(profile: str, has_torch_first: bool) -> None:
    environment = Recorded()
    image.add_packages(environment, profile, Progress(num_steps=2))
    names = [name for name, _ in environment.steps]
    assert names == ["create", *(["torch"] if has_torch_first else []), "lock", "compile all"]
    assert ("lock", [profile]) in environment.steps


def test_the_layer_of_the_project_compiles_all_of_it() -> None:
    environment = Recorded()
    image.add_project(environment, Progress(num_steps=2))
    assert [name for name, _ in environment.steps] == ["project", "compile"]
    assert {Path(str(name)).name for name in environment.steps[-1][1]} == {"cluster", "services", "rag", "ui"}  # type: ignore[attr-defined]


def test_files_for_another_python_do_not_stop_the_image(tmp_path: Path) -> None:
    environment = Environment(tmp_path, lambda text: None)
    site = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    (tmp_path / ".venv" / "bin").mkdir()
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (site / "new.py").write_text("this is no Python\n")
    (site / "old.py").write_text("a = 1\n")
    environment.compile_all()
    assert [path.name.split(".")[0] for path in site.rglob("*.pyc")] == ["old"]


@pytest.mark.parametrize("text", ["", "auto", "cuda"])
def test_an_image_needs_a_named_profile(text: str) -> None:
    with pytest.raises(SetupProblem):
        image.image_profile(text)
