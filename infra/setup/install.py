"""Makes the virtual environment and fills it from the locks. Touches nothing outside of the environment's folder.

Every part may be run again after an interruption: pip skips what is whole, `verify` finds what is not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from infra.setup.checks import SetupProblem, explain_pip_failure, is_unreachable

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LOCKS = {"base": ["base"], "cpu": ["cpu"], "gpu": ["gpu"]}

Detail = Callable[[str], None]


class Environment:
    """The folder `.venv` and its pip. `detail` is told each line of interest while something runs."""

    def __init__(self, root: Path, detail: Detail) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self._detail = detail

    def create(self, python: str) -> None:
        """Make the environment, or make it anew where its interpreter is gone or another one."""
        if not self._fits(python):
            if self.folder.exists():
                self._clear()
            self._run([python, "-m", "venv", str(self.folder)])

    def _fits(self, python: str) -> bool:
        if not self.python.exists():
            return False
        ask = "import sys; print(sys.version)"
        answers = [
            subprocess.run([p, "-c", ask], capture_output=True, text=True, check=False) for p in (python, self.python)
        ]
        pip = subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True, check=False)
        return answers[0].stdout == answers[1].stdout and answers[0].returncode == 0 and pip.returncode == 0

    def _clear(self) -> None:
        """Empty the folder but for the log and the lock that this run holds open."""
        for path in self.folder.iterdir():
            if path.name in ("setup.log", "setup.lock"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def install_torch_for_cpu(self, pin: str) -> bool:
        """Install the build of torch without CUDA; False where neither index has it."""
        if self.is_installed(pin):
            return True
        for index in ([], ["--index-url", TORCH_INDEX]):
            output, code = self._pip(["--no-deps", *index, pin])
            if code == 0:
                return True
            if "No space left on device" in output or (not index and is_unreachable(output)):
                raise explain_pip_failure(output, ["pip", "install", pin])
        return False

    def install_lock(self, names: Sequence[str]) -> None:
        """Install exactly what the locks say; `--no-deps` because a lock is already complete."""
        locks = [self.root / "requirements" / f"{name}.lock" for name in names]
        arguments = ["--no-deps"]
        for lock in locks:
            arguments += ["--requirement", str(lock)]
        self._install(arguments)
        damaged = self.incomplete(locks)
        if damaged:
            self._install(["--no-deps", "--force-reinstall", *damaged])
        if still := self.incomplete(locks):
            raise SetupProblem(
                f"These packages are damaged even after a second installation: {', '.join(still)}.",
                "Remove the folder .venv and run again.",
            )

    def compile(self, packages: Sequence[str], left_out: str = "") -> None:
        """Compile on all cores what a first start would otherwise compile in several processes at once.

        `left_out`: a pattern for paths that are not compiled.
        """
        site = next(self.folder.glob("lib/python3.*/site-packages"))
        options = ["-q", "-j0", *(["-x", left_out] if left_out else [])]
        self._run([str(self.python), "-m", "compileall", *options, *(str(site / name) for name in packages)])

    def compile_all(self) -> None:
        """Compile every package. Some carry files for other versions of Python: those fail, and are never imported."""
        site = next(self.folder.glob("lib/python3.*/site-packages"))
        self._follow([str(self.python), "-m", "compileall", "-qq", "-j0", str(site)])

    def install_project(self) -> None:
        """The repository itself, so that `windfarm` and its packages are found from any folder."""
        self._install(["--no-deps", "--no-build-isolation", "--editable", str(self.root)])

    def run_module(self, arguments: Sequence[str]) -> None:
        """Run a module of ours in the environment, its output going to the terminal."""
        code = subprocess.run([self.python, "-m", *arguments], cwd=self.root, check=False).returncode
        if code:
            raise SetupProblem(
                f"`python -m {' '.join(arguments)}` failed (see above).", "Mend the cause and run again."
            )

    def is_installed(self, pin: str) -> bool:
        lock = self.folder / "pin.txt"
        lock.write_text(pin + "\n")
        return not self.incomplete([lock])

    def incomplete(self, locks: Sequence[Path]) -> list[str]:
        verify = Path(__file__).with_name("verify.py")
        answer = subprocess.run(
            [self.python, verify, *locks], capture_output=True, text=True, check=True, env=clean_environment()
        )
        return answer.stdout.split()

    def _install(self, arguments: Sequence[str]) -> None:
        output, code = self._pip(arguments)
        if code:
            raise explain_pip_failure(output, ["pip", "install", *arguments])

    def _pip(self, arguments: Sequence[str]) -> tuple[str, int]:
        options = ["--disable-pip-version-check", "--no-input", "--no-compile", "--progress-bar=off", "--retries=2"]
        command = [str(self.python), "-m", "pip", "install", "--only-binary=:all:", *options, *arguments]
        return self._follow(command)

    def _run(self, command: Sequence[str]) -> None:
        output, code = self._follow(command)
        if code:
            raise SetupProblem(
                f"`{' '.join(command)}` failed:\n{output[-800:]}", "Remove the folder .venv and run again."
            )

    def _follow(self, command: Sequence[str]) -> tuple[str, int]:
        """Run to the end, tell each line of interest, keep everything in the log."""
        lines = []
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "setup.log").open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment()
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line)
                    log.write(line)
                    if told := short_form(line):
                        self._detail(told)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        return "".join(lines), process.wait()


def short_form(line: str) -> str | None:
    """What a line of pip means in a few words; None for lines that say nothing new."""
    if match := re.match(r"\s*Downloading (\S+?)(?:-\d\S*)?(?: \(([^)]+)\))?$", line.rstrip()):
        name = match[1].rsplit("/", 1)[-1]
        return f"downloading {name}" + (f" ({match[2]})" if match[2] else "")
    if match := re.match(r"Collecting ([\w.\[\]-]+)", line):
        return f"looking up {match[1]}"
    if line.startswith("Installing collected packages"):
        return f"unpacking {line.count(',') + 1} packages"
    return None


def clean_environment() -> dict[str, str]:
    """The environment without variables that would send packages elsewhere than into the virtual environment."""
    unwanted = (
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_USER",
        "PIP_REQUIREMENT",
        "__PYVENV_LAUNCHER__",
    )
    return {name: value for name, value in os.environ.items() if name not in unwanted}
