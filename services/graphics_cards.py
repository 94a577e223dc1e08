"""The GPUs of this machine and the memory of each, asked of the driver's own tool; no library of theirs is loaded."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from cluster.engines.choice import visible_devices
from cluster.errors import TopologyError
from cluster.topology import ACCELERATOR_MEMORY_LABEL, GB, Accelerator

TIMEOUT_S = 30.0


def read_cards(count: int) -> tuple[Accelerator, ...]:
    """Name and memory of each of the `count` GPUs that this process may use; raises `TopologyError` where the driver
    does not tell."""
    if not count:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,uuid", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
        rows = [line.rsplit(",", 2) for line in listed.splitlines() if line.strip()]
        cards = {uuid.strip(): Accelerator(name.strip(), int(mebibytes) * 2**20) for name, mebibytes, uuid in rows}
        visible = visible_devices()
        named = list(cards) if visible is None else [_uuid_of(entry, list(cards)) for entry in visible[:count]]
        return tuple(cards[uuid] for uuid in named[:count])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise TopologyError(
            f"The memory of this machine's {count} GPUs cannot be read ({error}). Say it with `windfarm up --label "
            f"{ACCELERATOR_MEMORY_LABEL}=<GB>`, or describe the machine for `windfarm plan --nodes`."
        ) from error


def _uuid_of(entry: str, uuids: Sequence[str]) -> str:
    """Of an index, or of the beginning of a UUID, as CUDA_VISIBLE_DEVICES has them."""
    if entry.isdecimal():
        found = uuids[int(entry) : int(entry) + 1]
    else:
        found = [uuid for uuid in uuids if uuid.startswith(entry)]
    if len(found) != 1:
        raise ValueError(f"CUDA_VISIBLE_DEVICES names {entry}, which is not one card of nvidia-smi")
    return found[0]


def label_of(cards: tuple[Accelerator, ...]) -> dict[str, str]:
    """The label by which Ray's nodes tell the memory of their GPUs: of the smallest, since Ray only counts them."""
    if not cards:
        return {}
    return {ACCELERATOR_MEMORY_LABEL: str(min(card.memory_bytes for card in cards) / GB)}
