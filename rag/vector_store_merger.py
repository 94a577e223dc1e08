"""Merges one shard folder that nobody else has open, in a process of its own: `python -m rag.vector_store_merger DIR`.

Writes `merged` where there was work. Runs behind everything else on the machine and ends with the process that waits
for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import qdrant_edge as qe

_PR_SET_PDEATHSIG = 1
_NICENESS = 10


def main() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or parent == 1:
        return  # it died before the kernel was asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICENESS)
    edge = qe.EdgeShard.load(sys.argv[1])
    has_worked = edge.optimize()
    edge.flush()
    edge.close()
    sys.stdout.write("merged" if has_worked else "nothing to do")


if __name__ == "__main__":
    main()
