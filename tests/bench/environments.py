"""Virtual environments of programs that windfarm is compared with, in the cache folder of the benchmarks.

They are made when a benchmark needs them, from pinned versions, and never touch the product's environment. One that was
not finished is made anew.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

CACHE = Path.home() / ".cache" / "windfarm-bench"
HERE = Path(__file__).parent
_STAMP = "windfarm-bench.stamp"


def litellm_folder() -> Path:
    """LiteLLM's proxy with everything that it needs."""
    return make_environment("litellm", HERE / "litellm.txt")


def ray_serve_llm_python() -> Path:
    """What Ray Serve LLM imports and windfarm leaves out, above the packages of the environment that runs this."""
    return make_environment("ray-serve-llm", HERE / "ray_serve_llm.txt", sees_ours=True) / "bin" / "python"


def make_environment(name: str, pins: Path, *, sees_ours: bool = False) -> Path:
    """The folder of an environment with exactly these packages. `sees_ours`: it sees the present one's below them."""
    folder = CACHE / name
    stamp = folder / _STAMP
    wanted = hashlib.sha256(pins.read_bytes() + sys.version.encode() + str(sees_ours).encode()).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="ascii") == wanted:
        return folder
    print(f"installing {name} into {folder}", file=sys.stderr, flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    python = folder / "bin" / "python"
    if sees_ours:
        below = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        Path(below, "windfarm_below.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(pins)]
    subprocess.run(install, check=True, stdout=sys.stderr)
    stamp.write_text(wanted, encoding="ascii")
    return folder
