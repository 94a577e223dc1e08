"""Shows a placement plan: a table of ranks, a picture of the nodes with memory bars, or plain data for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.plan import ExpertLoads, Plan, RankPlan
from cluster.plan_judgement import copied_experts, judge
from cluster.topology import Node, Topology

BAR_WIDTH = 24
_PARTS = (("weights", "cyan"), ("kv_cache", "magenta"), ("activations", "yellow"))
_PROCESSES = ("runtime", "blue")
_TITLES = {"kv_cache": "KV cache", "runtime": "processes"}


def plan_data(plan: Plan, loads: ExpertLoads | None = None) -> dict[str, Any]:
    """The plan as JSON-ready data. Bytes are whole numbers; `experts` has one list per layer. `loads` are what the
    balance is judged by; `copied_experts` says in how many layers an expert has copies."""
    parallel = plan.parallel
    return {
        "model": plan.shape.name,
        "parallel": {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "data": parallel.data,
            "expert": parallel.num_expert_ranks,
        },
        "replicas": [{"ranks": [_rank_data(rank) for rank in replica.ranks]} for replica in plan.replicas],
        "free_slots": dict(plan.free_slots),
        "reasons": list(plan.reasons),
        "copied_experts": {str(expert): layers for expert, layers in copied_experts(plan).items()},
        "balance": _balance(plan, loads),
    }


def _rank_data(rank: RankPlan) -> dict[str, Any]:
    return {
        "node": rank.node,
        "accelerator": rank.accelerator,
        "tensor_rank": rank.tensor_rank,
        "pipeline_rank": rank.pipeline_rank,
        "data_rank": rank.data_rank,
        "bytes": {
            "weights": rank.needs.weights,
            "kv_cache": rank.needs.kv_cache,
            "activations": rank.needs.activations,
            "processes": rank.needs.runtime,
            "capacity": rank.capacity,
            "free": rank.free,
        },
        "experts": [list(layer) for layer in rank.experts],
    }


def _balance(plan: Plan, loads: ExpertLoads | None) -> dict[str, Any] | None:
    """Linear placement, this plan, and what no placement can beat, as means over the layers."""
    balance = judge(plan, loads) if loads is not None else None
    return asdict(balance) if balance is not None else None


def print_plan(
    console: Console,
    topology: Topology,
    plan: Plan,
    loads: ExpertLoads | None = None,
    judged_by: str = "by the load that it was planned from",
) -> None:
    """The plan for people: a heading, the ranks, the nodes as a picture, why it is so, and how even `loads` make it."""
    parallel = plan.parallel
    console.print(
        Text.assemble(
            (plan.shape.name, "bold"),
            f": {len(plan.replicas)} x {parallel.num_ranks} ranks",
            f" (tensor {parallel.tensor}, pipeline {parallel.pipeline}, data {parallel.data}, "
            f"expert {parallel.num_expert_ranks})",
        )
    )
    console.print(_ranks_table(plan))
    console.print(_picture(topology, plan))
    for reason in plan.reasons:
        console.print(f"- {reason}")
    if copied := copied_experts(plan):
        listed = ", ".join(f"{expert} ({layers})" for expert, layers in copied.items())
        console.print(f"- Experts with copies, and in how many layers: {listed}.")
    balance = judge(plan, loads) if loads is not None else None
    if balance is not None:
        console.print(
            f"- Busiest rank against the mean, {judged_by}: linear {balance.linear:.3f}, this plan "
            f"{balance.planned:.3f}, {balance.over_bound:.1%} above the {balance.bound:.3f} that no placement "
            f"can beat. Worst in layer {balance.worst_layer}: {balance.worst:.3f}."
        )
    elif loads is not None:
        console.print(
            "- The load decides nothing here: each rank holds all experts. --data N spreads them over N ranks."
        )


def _ranks_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    parts = [name for name, _ in _parts(plan)]
    names = [_TITLES.get(name, name) for name in parts]
    for heading in ("replica", "rank", "node", "device", "experts", *names, "free"):
        table.add_column(heading, justify="left" if heading in ("node", "device", "experts") else "right")
    for number, replica in enumerate(plan.replicas):
        for index, rank in enumerate(replica.ranks):
            sizes = (*(getattr(rank.needs, name) for name in parts), rank.free)
            table.add_row(
                str(number), str(index), rank.node, _device(rank), _experts(rank), *(f"{s / 1e9:.1f} GB" for s in sizes)
            )
    return table


def _parts(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Fields of `RankBytes` and their colours; what processes hold counts on CPU nodes alone."""
    return _PARTS if plan.replicas[0].ranks[0].needs.runtime == 0 else (*_PARTS, _PROCESSES)


def _device(rank: RankPlan) -> str:
    return "CPU" if rank.accelerator is None else f"GPU {rank.accelerator}"


def _experts(rank: RankPlan) -> str:
    """Experts of the first layer; marked where layers differ."""
    if not rank.experts:
        return "-"
    first = ",".join(map(str, rank.experts[0]))
    return first if all(layer == rank.experts[0] for layer in rank.experts) else f"{first} (layer 0)"


def _picture(topology: Topology, plan: Plan) -> Group:
    """One panel per node that has ranks, each rank with its memory bar; nodes without are counted below."""
    panels: list[RenderableType] = []
    idle = []
    for node in topology.nodes:
        held = [
            (number, rank)
            for number, replica in enumerate(plan.replicas)
            for rank in replica.ranks
            if rank.node == node.name
        ]
        if not held:
            idle.append(node.name)
            continue
        lines = [_rank_line(number, rank, _parts(plan)) for number, rank in held]
        lines.append(Text(f"free: {plan.free_slots.get(node.name, 0)} of {_num_places(node, plan)}", style="dim"))
        panels.append(Panel(Group(*lines), title=_node_title(node), title_align="left", expand=False))
    legend = Text.assemble(
        *[part for name, colour in _parts(plan) for part in (("█ ", colour), f"{_TITLES.get(name, name)}  ")], "░ free"
    )
    if idle:
        panels.append(Text(f"Nothing on: {', '.join(idle)}", style="dim"))
    return Group(*panels, legend)


def _num_places(node: Node, plan: Plan) -> int:
    used = sum(rank.node == node.name for replica in plan.replicas for rank in replica.ranks)
    return len(node.accelerators) or used + plan.free_slots.get(node.name, 0)


def _node_title(node: Node) -> str:
    hardware = (
        f"{len(node.accelerators)} x {node.accelerators[0].kind}" if node.accelerators else f"{node.num_cores:g} cores"
    )
    zone = f", zone {node.zone}" if node.zone else ""
    return f"{node.name} ({hardware}, {node.memory_bytes / 2**30:.0f} GiB{zone})"


def _rank_line(number: int, rank: RankPlan, parts: tuple[tuple[str, str], ...]) -> Text:
    line = Text(f"replica {number} {_device(rank):6} ")
    drawn = 0
    for name, colour in parts:
        width = round(BAR_WIDTH * getattr(rank.needs, name) / rank.capacity)
        width = min(width, BAR_WIDTH - drawn)
        line.append("█" * width, style=colour)
        drawn += width
    line.append("░" * (BAR_WIDTH - drawn), style="dim")
    line.append(f" {rank.needs.total / 1e9:.1f} of {rank.capacity / 1e9:.1f} GB")
    if rank.experts:
        line.append(f"  experts {_experts(rank)}", style="green")
    return line
