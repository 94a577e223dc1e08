"""How long OpenMP threads spin at a barrier before they sleep: llama.cpp and PyTorch both compute with GNU OpenMP.

Its default spins for milliseconds. That is nothing on an idle machine, but as soon as another process wants a core the
spinning thread burns the time that the thread it waits for needs, some thousand times per token. Measured on a busy
two-core machine: about 1 token/s by default against tens with a short spin; on idle cores no difference was seen.
"""

from __future__ import annotations

import os

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SPIN_COUNT = "500"


def limit_spinning() -> None:
    """Must run before the first library that uses OpenMP is loaded; a value set by the operator stays."""
    os.environ.setdefault(SPIN_VARIABLE, SPIN_COUNT)
