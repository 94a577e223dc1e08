"""`windfarm up --threads N` reaches the engine's own parameters; a number in the file wins."""

from pathlib import Path

import pytest

from cluster.engines.llamacpp import LlamaCppEngine
from services.config import ModelConfig
from services.environment import read_environment
from services.model_server import build_engine
from services.ray_config import load_ray_config
from services.supervisor import settings
from services.up_options import UpOptions
from tests.product import ROOT, link_models


@pytest.mark.integration
@pytest.mark.parametrize(("option", "file", "used"), [(1, None, 1), (2, None, 2), (1, 3, 3)])
def test_threads_of_the_option_and_of_the_file(tmp_path: Path, option: int, file: int | None, used: int) -> None:
    link_models(tmp_path)
    options = UpOptions(tmp_path, load_ray_config(ROOT / "ray_config.yaml"), threads=option)
    variables = {"WINDFARM_HOME": str(tmp_path), "WINDFARM_INTERNAL_SECRET": "secret", **settings(options)}
    engine = build_engine(ModelConfig(id="tiny", engine="llamacpp", threads=file), read_environment(variables))
    assert isinstance(engine, LlamaCppEngine)
    parameters = engine._params
    assert (parameters.cpuparams.n_threads, parameters.cpuparams_batch.n_threads) == (used, used)
