"""How long OpenMP threads spin at a barrier before they sleep: llama.cpp and PyTorch both compute with GNU OpenMP.

Its default spins for milliseconds. That is nothing on an idle machine, but as soon as another process wants a core the
spinning thread burns the time that the thread it waits for needs, some thousand times per token. Measured on two cores
with other work running: 1 token/s by default, 20 to 40 with a short spin; on idle cores both give 118.
"""

from __future__ import annotations

import os

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SPIN_COUNT = "500"


def limit_spinning() -> None:
    """Must run before the first library that uses OpenMP is loaded; a value set by the operator stays."""
    os.environ.setdefault(SPIN_VARIABLE, SPIN_COUNT)
