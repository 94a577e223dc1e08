"""The GPUs of this machine and the memory of each, asked of the driver's own tool; no library of theirs is loaded."""

from __future__ import annotations

import subprocess

from cluster.errors import TopologyError
from cluster.topology import ACCELERATOR_MEMORY_LABEL, GB, Accelerator

TIMEOUT_S = 30.0


def read_cards(count: int) -> tuple[Accelerator, ...]:
    """Name and memory of each of `count` GPUs; raises `TopologyError` where the driver does not tell."""
    if not count:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
        rows = [line.rsplit(",", 1) for line in listed.splitlines() if line.strip()]
        return tuple(Accelerator(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in rows)[:count]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise TopologyError(
            f"The memory of this machine's {count} GPUs cannot be read ({error}). Say it with `windfarm up --label "
            f"{ACCELERATOR_MEMORY_LABEL}=<GB>`, or describe the machine for `windfarm plan --nodes`."
        ) from error


def label_of(cards: tuple[Accelerator, ...]) -> dict[str, str]:
    """The label by which Ray's nodes tell the memory of their GPUs: of the smallest, since Ray only counts them."""
    if not cards:
        return {}
    return {ACCELERATOR_MEMORY_LABEL: str(min(card.memory_bytes for card in cards) / GB)}
