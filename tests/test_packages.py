"""`cluster`, `services`, `rag`, `ui` are common names: what is imported must be ours, not some installed package."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.code_copies import copies, read_sources
from tests.product import Product

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cluster", "services", "rag", "ui")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_in_this_process_is_ours(package: str) -> None:
    assert Path(importlib.import_module(package).__file__ or "").parent == ROOT / package


def test_the_packages_are_ours_from_any_folder(tmp_path: Path) -> None:
    """As in a replica or an engine process, which start wherever Ray puts them."""
    program = f"import importlib; [print(importlib.import_module(name).__file__) for name in {PACKAGES!r}]"
    answer = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(line).parent for line in answer.stdout.split()] == [ROOT / package for package in PACKAGES]


def test_no_installed_package_takes_one_of_our_names() -> None:
    taken = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if name in PACKAGES and owners != ["windfarm"]
    }
    assert not taken


IN_A_WORKER = """
import importlib, json, subprocess, sys
import ray

PACKAGES = ("cluster", "services", "rag", "ui")
CODE = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {PACKAGES}))"

@ray.remote(num_cpus=0)
def in_worker():
    here = [importlib.import_module(name).__file__ for name in PACKAGES]
    started = subprocess.run([sys.executable, "-c", CODE], cwd="/", capture_output=True, text=True, check=True)
    return here, started.stdout.split()

def imported(replica):
    # In the process of a replica: what it has imported by itself.
    return {name: sys.modules[name].__file__ for name in PACKAGES if name in sys.modules}

ray.init(log_to_driver=False)
replicas = {}
for actor in ray.util.list_named_actors(all_namespaces=True):
    if actor["name"].startswith("SERVE_REPLICA::"):
        handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
        replicas[actor["name"].split("#")[1]] = ray.get(handle.__ray_call__.remote(imported))
print(json.dumps([ray.get(in_worker.remote()), replicas]))
"""


@pytest.mark.e2e
def test_the_packages_are_ours_in_every_replica_in_a_ray_worker_and_in_a_process_that_it_starts(
    product: Product, tmp_path: Path
) -> None:
    """Where llama.cpp serves a model, its replica is the engine's process; other engines are started by theirs. All of
    them import from the copy whose name is the hash of our sources."""
    variables = json.loads(product.run("env", "--json").stdout)
    (tmp_path / "driver.py").write_text(IN_A_WORKER)
    command = [sys.executable, "driver.py"]
    environment = {**os.environ, **variables}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    origins, replicas = json.loads(answer.stdout.splitlines()[-1])
    copy = copies(product.home / "run") / read_sources(ROOT).version
    for found in origins:
        assert [Path(origin).parent for origin in found] == [copy / package for package in PACKAGES]
    wanted = {
        "ModelServer": {"cluster", "services"},
        "Embedding": {"cluster", "services"},
        "Store": {"rag", "services"},
        "Gateway": {"services"},
        "Ui": {"ui", "services"},
    }
    assert replicas.keys() == wanted.keys()
    for deployment, files in replicas.items():
        assert wanted[deployment] <= files.keys()
        assert {name: Path(file).parent for name, file in files.items()} == {name: copy / name for name in files}
