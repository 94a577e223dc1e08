"""Our processes start without what they do not need: pandas in Serve, LangChain before the first search."""

import os
import subprocess
import sys
from pathlib import Path

from services.process_environment import STARTUP, load_secrets, process_variables
from services.ray_config import load_ray_config

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, path: str) -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_serve_loads_no_pandas_and_others_still_can() -> None:
    code = "import sys, ray.serve; print('pandas' in sys.modules); import pandas; print(pandas.DataFrame([1]).size)"
    assert run_python(code, f"{ROOT}{os.pathsep}{STARTUP}").split() == ["False", "1"]


def test_without_our_folder_serve_loads_pandas() -> None:
    """Otherwise the part above has lost its purpose."""
    assert run_python("import sys, ray.serve; print('pandas' in sys.modules)", str(ROOT)) == "True"


def test_the_folder_is_on_the_path_of_every_process(tmp_path: Path) -> None:
    config = load_ray_config(ROOT / "ray_config.yaml")
    path = process_variables(tmp_path, load_secrets(tmp_path, renew=True), config, {})["PYTHONPATH"]
    assert path.split(os.pathsep)[-1] == str(STARTUP)


def test_building_the_store_loads_no_langchain() -> None:
    assert run_python("import sys, services.store; print('langchain_core' in sys.modules)", str(ROOT)) == "False"
