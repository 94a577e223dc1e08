"""The profile without vLLM is whole: every module of ours can be imported without what only the other profile has."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

from infra.setup.verify import pins

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cluster", "services", "rag", "ui")
# Imported only where torch is: in vLLM's worker processes, and for a model that PyTorch has loaded.
BESIDE_TORCH = {
    Path("cluster/vllm_plugin/worker.py"),
    Path("cluster/vllm_plugin/expert_counters.py"),
    Path("cluster/engines/embedding_bert.py"),
    Path("cluster/engines/embedding_int8.py"),
}
PROGRAM = """
import importlib, sys

absent = set(sys.argv[1].split(","))

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"{name} is not in the base profile", name=name)

sys.meta_path.insert(0, Absent())
for module in sys.argv[2:]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"{module}: {error}")
"""


def names(lock: str) -> set[str]:
    return {canonicalize_name(name) for name, _ in pins(ROOT / "requirements" / f"{lock}.lock")}


def modules_of(distributions: set[str]) -> set[str]:
    """Top-level modules that only these distributions have."""
    owners = importlib.metadata.packages_distributions()
    return {module for module, of in owners.items() if {canonicalize_name(name) for name in of} <= distributions}


def our_modules() -> list[str]:
    paths = (path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    runnable = ("__init__", "__main__", "env", "sitecustomize")
    return [
        ".".join(path.with_suffix("").parts)
        for path in paths
        if path.stem not in runnable and "versions" not in path.parts and path not in BESIDE_TORCH
    ]


def test_every_module_can_be_imported_without_vllm_and_torch() -> None:
    absent = modules_of(names("cpu") - names("base")) | {"torch", "vllm", "transformers"}
    command = [sys.executable, "-c", PROGRAM, ",".join(sorted(absent)), *our_modules()]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == ""


def test_the_profiles_agree_on_versions() -> None:
    base = dict(pins(ROOT / "requirements/base.lock"))
    cpu = dict(pins(ROOT / "requirements/cpu.lock"))
    assert {name: version for name, version in base.items() if cpu.get(name) != version} == {}
