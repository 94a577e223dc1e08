"""Checkpoints that the tests of real ranks share."""

from pathlib import Path

import pytest

from cluster.home import open_home
from cluster.weights.prepare import prepare
from cluster.weights.upcycle import MixtureRecipe, upcycle
from tests.cluster.vllm_plugin.small_mixtures import LAYERS
from tests.expert_oracle import Reference, shortened


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shortened(prepare("tiny", "hf", open_home()), tmp_path_factory.mktemp("parent") / "dense", LAYERS)


@pytest.fixture(scope="module")
def distinct(parent: Path) -> Path:
    upcycle(parent, parent.parent / "distinct", MixtureRecipe(variant="distinct", noise=0.5, dtype="float32"))
    return parent.parent / "distinct"


@pytest.fixture(scope="module")
def oracle(distinct: Path) -> Reference:
    return Reference(distinct)
