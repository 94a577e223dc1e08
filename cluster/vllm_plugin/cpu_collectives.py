"""Collectives with a different number of rows on each rank, which vLLM's CPU communicator lacks.

Data-parallel attention with expert parallelism gathers the tokens of all ranks, has each rank compute its experts, and
adds the partial results up for the rank where the token came from. Ranks differ in their number of tokens; one may have
none. Both directions are one all-to-all over gloo, so that only the rows that a rank needs travel, and each rank adds
in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def install() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv


def gather_rows(
    tensors: Sequence[torch.Tensor], sizes: Sequence[int], rank: int, group: Any = None
) -> list[torch.Tensor]:
    """Rows of all ranks, in rank order.

    `tensors` are of shape [sizes[rank], ...] each; the results are of shape [sum(sizes), ...]. All of them travel in
    one message.
    """
    import torch

    rows = sizes[rank]
    packed = torch.cat([_as_bytes(tensor, rows) for tensor in tensors], dim=1)
    width = packed.shape[1]
    gathered = packed.new_empty((sum(sizes), width))
    # Every other rank gets the same rows; ours need not travel.
    outgoing = [0 if other == rank else rows * width for other in range(len(sizes))]
    incoming = [0 if other == rank else size * width for other, size in enumerate(sizes)]
    received = packed.new_empty(sum(incoming))
    _exchange(received, packed.flatten().repeat(len(sizes) - 1), incoming, outgoing, group)
    first = sum(sizes[:rank])
    gathered[first : first + rows] = packed
    before = first * width
    gathered[:first] = received[:before].view(first, width)
    gathered[first + rows :] = received[before:].view(-1, width)
    return _unpack(gathered, tensors)


def scatter_sums(tensor: torch.Tensor, sizes: Sequence[int], rank: int, group: Any = None) -> torch.Tensor:
    """The sum over all ranks of our rows.

    `tensor` is of shape [sum(sizes), ...], with this rank's share of every row's sum; the result is of shape
    [sizes[rank], ...]. Shares are added in float32 (or wider) and in rank order.
    """
    import torch

    rows, width = sizes[rank], tensor[0:1].numel() if tensor.shape[0] else tensor.shape[1:].numel()
    flat = tensor.contiguous().view(-1, width)
    first = sum(sizes[:rank])
    mine = flat[first : first + rows]
    others = torch.cat([flat[:first], flat[first + rows :]])
    outgoing = [0 if other == rank else size * width for other, size in enumerate(sizes)]
    incoming = [0 if other == rank else rows * width for other in range(len(sizes))]
    received = flat.new_empty(sum(incoming))
    _exchange(received, others.flatten(), incoming, outgoing, group)
    shares = list(received.view(len(sizes) - 1, rows, width))
    shares.insert(rank, mine)
    total = shares[0].to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    for share in shares[1:]:
        total += share
    return total.to(tensor.dtype).view(rows, *tensor.shape[1:])


def _exchange(received: Any, sent: Any, incoming: list[int], outgoing: list[int], group: Any) -> None:
    import torch.distributed as distributed

    distributed.all_to_all_single(received, sent, incoming, outgoing, group=group)


def _as_bytes(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    import torch

    if tensor.shape[0] != rows:
        raise ValueError(f"This rank has {tensor.shape[0]} rows, but told the others {rows}.")
    return tensor.contiguous().view(rows, tensor.shape[1:].numel()).view(torch.uint8)


def _unpack(gathered: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    import torch

    result, start = [], 0
    for tensor in like:
        width = tensor.shape[1:].numel() * tensor.element_size()
        # A copy even of what lies together already: the offset of a part may not be a multiple of its element size.
        part = gathered[:, start : start + width].clone(memory_format=torch.contiguous_format).view(tensor.dtype)
        result.append(part.view(gathered.shape[0], *tensor.shape[1:]))
        start += width
    return result


def _all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """For `CpuCommunicator`: a tensor, or a list of tensors with equal numbers of rows. `sizes` None: all alike."""
    if dim != 0:
        raise NotImplementedError("rows can only be gathered along dimension 0")
    tensors = input_ if isinstance(input_, list) else [input_]
    if self.world_size == 1:
        return input_
    sizes = sizes or [tensors[0].shape[0]] * self.world_size
    gathered = gather_rows(tensors, sizes, self.rank_in_group, self.device_group)
    return gathered if isinstance(input_, list) else gathered[0]


def _reduce_scatterv(self: Any, input_: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
    """For `CpuCommunicator`. `sizes` None: all alike."""
    if dim not in (0, -input_.dim()):
        raise NotImplementedError("sums can only be scattered along dimension 0")
    if self.world_size == 1:
        return input_
    if sizes is None:
        if input_.shape[0] % self.world_size:
            raise ValueError(f"{input_.shape[0]} rows cannot be shared evenly by {self.world_size} ranks.")
        sizes = [input_.shape[0] // self.world_size] * self.world_size
    return scatter_sums(input_, sizes, self.rank_in_group, self.device_group)
