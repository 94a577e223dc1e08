"""Set-up inside of a container image: the steps of `make setup` in two layers, without models. Standard library only.

    PROFILE=cpu|gpu|base python3 -m infra.setup.image packages     needs requirements/ and infra/setup/ alone
    python3 -m infra.setup.image project                           needs the whole product

Models belong into the data folder, which no image holds. Everything is compiled: an image is read-only when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from infra.setup import checks
from infra.setup.checks import SetupProblem
from infra.setup.install import Environment
from infra.setup.program import ROOT, install_packages, read_profile
from infra.setup.progress import Progress
from infra.setup.stamp import Stamp

PACKAGES = ("cluster", "services", "rag", "ui")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m infra.setup.image", description=__doc__)
    parser.add_argument("layer", choices=["packages", "project"])
    layer = parser.parse_args(arguments).layer
    progress = Progress(num_steps=2)
    environment = Environment(ROOT, progress.detail)
    try:
        if layer == "packages":
            add_packages(environment, image_profile(os.environ.get("PROFILE", "")), progress)
        else:
            add_project(environment, progress)
    except SetupProblem as problem:
        sys.stderr.write(f"\nSet-up stopped: {problem}\nWhat to do: {problem.fix}\n")
        return 1
    return 0


def image_profile(text: str) -> str:
    """The profile to install: named, since where an image is built says nothing about where it will run."""
    if text in ("", "auto"):
        raise SetupProblem("An image needs a named profile.", "Set PROFILE to cpu, gpu or base.")
    return read_profile(text)


def add_packages(environment: Environment, profile: str, progress: Progress) -> None:
    """The layer that changes rarely: interpreter environment and everything from the locks."""
    python = checks.choose_python()
    checks.check_venv_module(python)
    progress.step(f"Virtual environment ({python})")
    environment.create(python)
    progress.step(f"Packages of the profile {profile}")
    wanted = Stamp(key="", dev_key=None, asked=profile, profile=profile, home="")
    install_packages(environment, wanted, profile, progress, previous=None)
    environment.compile_all()


def add_project(environment: Environment, progress: Progress) -> None:
    """The layer that changes with the code."""
    progress.step("windfarm itself")
    environment.install_project()
    environment.compile([str(environment.root / name) for name in PACKAGES])
    progress.step("Ready")


if __name__ == "__main__":
    sys.exit(main())
