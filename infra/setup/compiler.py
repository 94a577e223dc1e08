"""Whether this machine can compile what vLLM compiles on a GPU when it starts: Triton's kernels call a C compiler.

Also run by `windfarm doctor`, with the environment's Python: prints what is missing and what to do, a line each, or
nothing. Standard library only; it imports nothing of set-up, which is no package of the environment.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def missing(python: str) -> tuple[str, str] | None:
    """What is not there and how to get it. `python`: the interpreter whose headers are compiled against."""
    named = os.environ.get("CC")
    compilers = shlex.split(named)[:1] if named else ["gcc", "clang"]
    lacks = []
    if not any(shutil.which(compiler) for compiler in compilers):
        lacks.append(f"a C compiler (CC is {named}, which is not there)" if named else "a C compiler")
    version, include = _headers_of(python)
    if not (Path(include) / "Python.h").is_file():
        lacks.append(f"Python's headers ({include}/Python.h)")
    if not lacks:
        return None
    fix = (
        f"Install them with `sudo apt-get install build-essential python{version}-dev` (for another Python its own "
        "development files) and run again; PROFILE=base make setup does without vLLM."
    )
    return f"vLLM compiles for the GPU when it starts, and this machine lacks {' and '.join(lacks)}.", fix


def _headers_of(python: str) -> tuple[str, str]:
    """Version ("3.12") of an interpreter, and where its headers are."""
    ask = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2]); print(sysconfig.get_paths()['include'])"
    answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    version, include = answer.stdout.splitlines()
    return version, include


if __name__ == "__main__":
    sys.stdout.write("\n".join(missing(sys.executable) or ()))
