"""The store that ranks meet in listens on one address, from the moment on at which a process has its configuration."""

import importlib
import inspect
import json
import multiprocessing
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from cluster.vllm_plugin.closed_stores import Closed, closed_stores_option

# 127.0.0.1 as /proc writes it.
LOOPBACK = "0100007F"


def open_store(option: Any, port: int, answers: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    inodes = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(path))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1])
    dist.destroy_process_group()
    answers.put((found, type(option).__name__))


def listening(option: Any) -> list[str]:
    """Addresses on which a new process listens that got this option and met itself."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=open_store, args=(option, port, answers))
    process.start()
    try:
        found, _ = answers.get(timeout=120)
    finally:
        process.join(30)
        process.kill()
    return [address for address in found if int(address.split(":")[1], 16) == port]


def test_torch_itself_listens_on_all_interfaces() -> None:
    """The reason for this part; when it fails, torch has learned it."""
    (address,) = listening(None)
    assert not address.startswith(LOOPBACK)


def test_a_process_that_gets_the_option_listens_on_the_given_address_alone() -> None:
    (address,) = listening(closed_stores_option())
    assert address.startswith(LOOPBACK)


def test_the_option_is_a_word_for_whoever_only_reads_it() -> None:
    assert json.dumps(closed_stores_option()) == '{"windfarm_closed_stores": "on"}'
    assert isinstance(pickle.loads(pickle.dumps(Closed("on"))), Closed)


def test_torch_has_the_function_that_is_changed() -> None:
    from torch.distributed import TCPStore

    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    assert list(inspect.signature(rendezvous._create_c10d_store).parameters)[:5] == [
        "hostname",
        "port",
        "rank",
        "world_size",
        "timeout",
    ]
    assert "master_listen_fd" in (TCPStore.__init__.__doc__ or "")
