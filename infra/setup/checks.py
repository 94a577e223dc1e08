"""What set-up needs of the machine, checked before anything is written. Standard library only.

Each check raises `SetupProblem`, whose text names the cause and what to do about it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

SUPPORTED = ("3.11", "3.12", "3.13")
"""Python versions that the locks were resolved for, best tested first."""

FREE_GIB = {"base": 3.0, "cpu": 6.0, "gpu": 16.0}
"""Disk that each profile's environment takes, with downloads and models, rounded up."""


class SetupProblem(Exception):
    """Set-up cannot go on. `fix` says what to do."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def find_python(version: str) -> str | None:
    """Path of an interpreter of exactly this version ("3.12"), or None."""
    for candidate in candidates(version):
        if python_version(candidate) == version:
            return candidate
    return None


def candidates(version: str) -> Iterator[str]:
    """Places where an interpreter of this version may be: this one, the PATH, pyenv's and Debian's folders."""
    yield sys.executable
    if found := shutil.which(f"python{version}"):
        yield found
    yield f"/usr/bin/python{version}"
    for path in sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python")):
        yield str(path)


def python_version(python: str) -> str | None:
    """Version of an interpreter as "3.12"; None where it does not run."""
    try:
        answer = subprocess.run(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def choose_python() -> str:
    """The interpreter that the environment is made from: this one where it is supported, else the first found."""
    if "{}.{}".format(*sys.version_info[:2]) in SUPPORTED:
        return sys.executable
    for version in SUPPORTED:
        if (python := find_python(version)) is not None:
            return python
    here = ".".join(str(part) for part in sys.version_info[:3])
    raise SetupProblem(
        f"windfarm needs Python {SUPPORTED[0]} to {SUPPORTED[-1]}; this is Python {here} and no other was found.",
        "Install one (Debian 12, Ubuntu 24.04: `sudo apt-get install python3 python3-venv`; elsewhere for example "
        "`pyenv install 3.12`) and run the command again; PYTHON=/path/to/python make up picks a certain one.",
    )


def check_venv_module(python: str) -> None:
    """Debian ships Python without `ensurepip`: `venv` then fails half-way."""
    if subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode:
        version = python_version(python) or "3"
        raise SetupProblem(
            f"{python} cannot make virtual environments: its `venv` or `ensurepip` module is missing.",
            f"Install it with `sudo apt-get install python{version}-venv` (or `python3-venv`) and run again.",
        )


def check_disk(folder: Path, needed_gib: float, purpose: str) -> None:
    """`folder` need not exist yet: the nearest folder above it that does is asked."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    if free_gib < needed_gib:
        raise SetupProblem(
            f"{folder} has {free_gib:.1f} GiB free; {purpose} needs {needed_gib:.1f} GiB.",
            "Free some space there, or clone to a larger disk (models: set WINDFARM_HOME to a folder on it).",
        )


def check_writable(folder: Path) -> None:
    try:
        probe = folder / ".setup-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SetupProblem(
            f"Nothing can be written to {folder}: {error.strerror}.",
            "Clone to a folder of your own, or give yourself the right to write there.",
        ) from error


def has_gpu() -> bool:
    """An NVIDIA GPU that the driver lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0 and "GPU " in answer.stdout


NETWORK_SIGNS = (
    "NewConnectionError",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "Connection refused",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "Connection broken",
    "Max retries exceeded",
)
COMPILER_SIGNS = (
    "Microsoft Visual C++",
    "gcc' failed",
    "g++' failed",
    "CMake must be installed",
    "metadata-generation-failed",
)


def explain_pip_failure(output: str, command: Sequence[str]) -> SetupProblem:
    """Turn pip's output into a cause and a next step."""
    last = [line for line in output.splitlines() if line.startswith("ERROR")][-3:]
    said = "\n".join(last) or output[-600:]
    if "No space left on device" in output:
        return SetupProblem("The disk is full.", "Free some space and run again; set-up goes on where it stopped.")
    if "No matching distribution found" in output:
        package = output.split("No matching distribution found for ")[-1].splitlines()[0]
        network = any(sign in output for sign in NETWORK_SIGNS)
        if network:
            return no_network(said)
        return SetupProblem(
            f"The package index has no prebuilt {package} for this Python and machine.",
            "windfarm never compiles packages: use Python 3.11 to 3.13 on 64-bit Linux, or an index that has it "
            "(PIP_INDEX_URL).",
        )
    if any(sign in output for sign in NETWORK_SIGNS):
        return no_network(said)
    if any(sign in output for sign in COMPILER_SIGNS):
        return SetupProblem(
            "A package wanted to be compiled, and that failed.\n" + said,
            "Install a compiler (`sudo apt-get install build-essential`), or use Python 3.11 to 3.13 on 64-bit Linux, "
            "for which every package comes prebuilt.",
        )
    return SetupProblem(f"`{' '.join(command)}` failed.\n{said}", "The whole output is in .venv/setup.log.")


def is_unreachable(output: str) -> bool:
    """Whether pip could ask no index at all: one that answered would have told other versions."""
    return "(from versions: none)" in output and any(sign in output for sign in NETWORK_SIGNS)


def no_network(said: str) -> SetupProblem:
    return SetupProblem(
        "The package index cannot be reached.\n" + said,
        "Check the network; behind a proxy set HTTPS_PROXY, with an index of your own PIP_INDEX_URL. Run again: set-up "
        "goes on where it stopped.",
    )
