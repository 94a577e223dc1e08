"""A model of a hub, named in one line: fetched once, only what an engine reads, and there without the hub later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.cluster.local_hub import LocalHub, local_hub

CHECKPOINT = {
    "config.json": json.dumps({"architectures": ["TinyModel"], "hidden_size": 2}).encode(),
    "model.safetensors": save({"embed.weight": np.ones((3, 2), np.float32)}),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
}
LEFT_THERE = {
    "README.md": b"# A model",
    "pytorch_model.bin": b"the weights once more",
    "onnx/model.onnx": b"and once more",
    "name.Q8.gguf": b"GGUF eight bits",
}
QUANTIZED = {"config.json": b"{}", "name.Q4.gguf": b"GGUF four bits", "name.Q8.gguf": b"GGUF eight bits"}
OLD = {"config.json": b'{"architectures": ["TinyModel"], "hidden_size": 1}', "model.safetensors": save({})}
WITHOUT_WEIGHTS = {"config.json": b'{"hidden_size": 3}', "pytorch_model.bin": b"weights"}

PREPARE = """
import json, sys
from pathlib import Path
from cluster.catalogue import resolve
from cluster.errors import ClusterError
from cluster.home import open_home
from cluster.weights.prepare import prepare

def told(source):
    try:
        path = prepare(source, resolve(source).formats[0], open_home(Path(sys.argv[1])))
    except ClusterError as error:
        return str(error)
    if path.is_file():
        return {path.name: path.read_text()}
    return {str(each.relative_to(path)): each.read_text("latin-1") for each in path.rglob("*") if each.is_file()}

print(json.dumps([told(source) for source in sys.argv[2:]]))
"""


def prepare(home: Path, endpoint: str, *sources: str, **environment: str) -> list[Any]:
    """For each source what was prepared, in a process of its own: the library reads its variables when it is imported.
    The contents of the files by name, or why there are none."""
    # Tests before this one load engines, which work offline, and a machine may reach the world through a proxy only.
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_offline", "_proxy"))}
    answer = subprocess.run(
        [sys.executable, "-c", PREPARE, str(home), *sources],
        capture_output=True,
        text=True,
        env={**inherited, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found: list[Any] = json.loads(answer.stdout)
    return found


def text_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: content.decode("latin-1") for name, content in files.items()}


SOURCES = ("hf:owner/name", "hf:owner/name@old", "hf:owner/name@quantized/name.Q4.gguf")
PREPARED = [text_of(CHECKPOINT), text_of(OLD), {"name.Q4.gguf": "GGUF four bits"}]


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    revisions = {"main": CHECKPOINT | LEFT_THERE, "old": OLD, "quantized": QUANTIZED, "bare": WITHOUT_WEIGHTS}
    with local_hub(revisions) as server:
        yield server


@pytest.fixture(scope="module")
def fetched(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A data folder, and what was prepared there of each of the sources and of two that cannot be had."""
    home = tmp_path_factory.mktemp("home")
    return home, prepare(home, hub.url, *SOURCES, "hf:owner/name@bare", "hf:owner/name@future")


def test_a_checkpoint_of_any_revision_and_a_single_file_are_fetched(
    hub: LocalHub, fetched: tuple[Path, list[Any]]
) -> None:
    _, found = fetched
    assert found[:3] == PREPARED
    of_bare = ["config.json"]
    assert sorted(hub.given) == sorted([*CHECKPOINT, *OLD, "name.Q4.gguf", *of_bare])


def test_what_a_hub_has_and_no_engine_reads_is_explained(fetched: tuple[Path, list[Any]]) -> None:
    _, (*_, bare, future) = fetched
    assert "has a config.json but no .safetensors weights" in bare
    assert "The hub does not give owner/name" in future
    assert "Check owner and name" in future


@pytest.mark.parametrize("state", ["there", "gone", "not to be asked"])
def test_what_was_fetched_is_used_whatever_became_of_the_hub(
    hub: LocalHub, fetched: tuple[Path, list[Any]], state: str
) -> None:
    home, _ = fetched
    num_given = len(hub.given)
    endpoint = hub.url if state == "there" else "http://127.0.0.1:9"
    variables = {"HF_HUB_OFFLINE": "1"} if state == "not to be asked" else {}
    assert prepare(home, endpoint, *SOURCES, **variables) == PREPARED
    assert len(hub.given) == num_given
