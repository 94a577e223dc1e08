"""Rows of all ranks are gathered, and sums scattered, over gloo groups of 2 and 4 processes, for any row counts."""

import multiprocessing
import traceback
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.requires("vllm")]

WORLD = 4
# Rows per rank: alike, different, an idle rank, one rank with everything, nobody with anything.
SIZES = {2: [[3, 3], [1, 5], [0, 4], [4, 0], [0, 0]], 4: [[2, 2, 2, 2], [1, 7, 2, 3], [0, 3, 0, 1], [0, 0, 9, 0]]}
HIDDEN = 6


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What each of four processes has to complain about."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    meeting = tmp_path_factory.mktemp("gloo") / "meeting"
    processes = [context.Process(target=_rank, args=(rank, meeting, queue), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        return dict(queue.get() for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def test_all_row_counts_on_two_and_four_ranks(complaints: dict[int, str]) -> None:
    assert complaints == dict.fromkeys(range(WORLD), "")


def _rank(rank: int, meeting: Path, queue: Any) -> None:
    try:
        _check_all(rank, meeting)
        queue.put((rank, ""))
    except BaseException:  # noqa: BLE001  # the test shows it
        queue.put((rank, traceback.format_exc()))


def _check_all(rank: int, meeting: Path) -> None:
    import torch
    import torch.distributed as distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    groups = {2: distributed.new_group([0, 1]), 4: distributed.new_group(range(4))}
    for world, cases in SIZES.items():
        if rank >= world:
            continue
        for sizes in cases:
            for dtype in (torch.float32, torch.bfloat16):
                _check_gather(rank, sizes, dtype, groups[world])
                _check_sums(rank, sizes, dtype, groups[world])
    _check_refusal(rank, groups[4])
    distributed.destroy_process_group()


def _check_gather(rank: int, sizes: list[int], dtype: Any, group: Any) -> None:
    import torch

    from cluster.vllm_plugin.cpu_collectives import gather_rows

    everything = torch.randn(sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(7)).to(dtype)
    numbers = torch.arange(sum(sizes))
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    rows, ids = gather_rows([everything[mine], numbers[mine]], sizes, rank, group)
    assert rows.dtype == dtype
    assert torch.equal(rows, everything)
    assert torch.equal(ids, numbers)


def _check_sums(rank: int, sizes: list[int], dtype: Any, group: Any) -> None:
    import torch

    from cluster.vllm_plugin.cpu_collectives import scatter_sums

    shares = [
        torch.randn(sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(other)).to(dtype)
        for other in range(len(sizes))
    ]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    expected = sum(share.float() for share in shares).to(dtype)[mine]
    result = scatter_sums(shares[rank], sizes, rank, group)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def _check_refusal(rank: int, group: Any) -> None:
    import torch

    from cluster.vllm_plugin.cpu_collectives import gather_rows

    with pytest.raises(ValueError, match="has 2 rows, but told the others 1"):
        gather_rows([torch.zeros(2, HIDDEN)], [1, 1, 1, 1], rank, group)
