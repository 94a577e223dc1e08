"""What is left of the nodes while the parts of a configuration are put on them, one after the other.

Amounts are counted as Ray counts them: cores, memory, GPUs. What may lie on any node goes to the one with most memory
left, since Serve spreads replicas. Nothing is asked of Ray here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.plan import Plan
from cluster.topology import Topology
from services.resources import Resources

# Shares such as 0.1 are no exact binary fractions.
_ROUNDING = 1e-9


class Room:
    """The nodes of `topology`, of which the first is the head, less what was taken."""

    def __init__(self, topology: Topology) -> None:
        self._left = list(topology.nodes)
        self._gpus = [float(len(node.accelerators)) for node in topology.nodes]
        self._had_accelerators = topology.has_accelerators

    @property
    def topology(self) -> Topology:
        """The nodes as a plan sees them: a GPU of which a share is taken is gone."""
        return Topology(
            tuple(
                replace(node, accelerators=node.accelerators[: int(gpus + _ROUNDING)])
                for node, gpus in zip(self._left, self._gpus, strict=True)
            )
        )

    @property
    def has_lost_all_gpus(self) -> bool:
        """Whether there are GPUs and all are taken; ranks would be planned on CPUs then."""
        return self._had_accelerators and not self.topology.has_accelerators

    def take(self, each: Resources, among: Sequence[str] = ()) -> bool:
        """One replica, on the head where it belongs there, else on one of the nodes `among` (empty: any); false where
        none of them holds it."""
        indices = [0] if each.is_on_head else range(len(self._left))
        fitting = [i for i in indices if (not among or self._left[i].name in among) and self._holds(i, each)]
        if not fitting:
            return False
        self._subtract(max(fitting, key=lambda i: (self._left[i].memory_bytes, self._left[i].num_cores)), each)
        return True

    def take_all(self, each: Resources, replicas: int) -> int:
        """The number of these replicas that no node holds."""
        return sum(not self.take(each) for _ in range(replicas))

    def take_plan(self, made: Plan, rank: Resources, among: Sequence[str] = ()) -> int:
        """The ranks of a plan, where it has them or, since Ray goes by what is reserved, on other nodes `among`; `rank`
        is what one with its tensor-parallel group reserves. Returns the number of ranks that no node holds."""
        seats = [seat.node for replica in made.replicas for seat in replica.ranks if seat.tensor_rank == 0]
        left_over = 0
        for planned in seats:
            may_be_there = not among or planned in among
            if not (may_be_there and self.take(rank, [planned])) and not self.take(rank, among):
                left_over += 1
        return left_over

    def _holds(self, index: int, each: Resources) -> bool:
        node = self._left[index]
        return (
            each.num_cpus <= node.num_cores + _ROUNDING
            and each.memory <= node.memory_bytes
            and each.num_gpus <= self._gpus[index] + _ROUNDING
        )

    def _subtract(self, index: int, each: Resources) -> None:
        node = self._left[index]
        self._left[index] = replace(
            node, num_cores=node.num_cores - each.num_cpus, memory_bytes=node.memory_bytes - each.memory
        )
        self._gpus[index] -= each.num_gpus
