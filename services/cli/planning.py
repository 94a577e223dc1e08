"""`plan`: how a model would be cut and placed, before anything starts."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.cli.command_line import command_line
from services.cli.options import JsonOption
from services.cli.output import put, put_json, say
from services.cli.svg import SvgOption, save_svg
from services.environment import data_folder
from services.setup_errors import NotRunning

if TYPE_CHECKING:
    from cluster.plan import ExpertLoads
    from cluster.sizing import ModelShape
    from cluster.topology import Topology

NodesOption = Annotated[
    Path | None,
    typer.Option(
        "--nodes",
        help="YAML file that describes the nodes; infra/nodes has examples.",
        show_default="those of the windfarm that runs here, else this machine",
        exists=True,
        dir_okay=False,
    ),
]


def plan(
    invocation: typer.Context,
    model: Annotated[str, typer.Argument(help="A known model (mixtral-8x7b, ...) or a checkpoint folder.")],
    nodes: NodesOption = None,
    replicas: Annotated[int, typer.Option(help="Replicas to place.")] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens per sequence.", show_default="8192 or what fits")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences that one replica holds at once.")] = 8,
    tensor: Annotated[int | None, typer.Option(help="Tensor-parallel ranks.", show_default="chosen")] = None,
    pipeline: Annotated[
        int | None, typer.Option(help="Pipeline stages, to look at: windfarm starts none.", show_default="1")
    ] = None,
    data: Annotated[int | None, typer.Option(help="Data-parallel ranks of a gang.", show_default="chosen")] = None,
    cores_per_rank: Annotated[
        float | None,
        typer.Option(help="CPU cores of a rank on CPU nodes.", show_default="what windfarm reserves"),
    ] = None,
    load: Annotated[
        Path | None, typer.Option("--load", help="Place the experts by this routing trace (windfarm experts --save).")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option("--judge", help="Judge the placement by this other trace.", show_default="by --load")
    ] = None,
    redundant: Annotated[
        int, typer.Option("--redundant", min=0, help="Copies of busy experts in each layer, on GPUs; needs --load.")
    ] = 0,
    emit: Annotated[
        Literal["kuberay"] | None, typer.Option(help="Write manifests for this platform instead of the plan.")
    ] = None,
    svg: SvgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a model would be placed: ranks, experts and memory per node, and why. Nothing is started."""
    from rich.console import Console

    from cluster.expert_placement import plan as make_plan
    from cluster.expert_placement import plan_with_fitting_context
    from cluster.known_shapes import find_shape
    from cluster.plan import NODE_MEMORY_SHARE
    from cluster.sizing import Workload
    from cluster.topology import read_topology
    from services.plan_view import plan_data, print_plan
    from services.sharding import request_on_ray

    shape = find_shape(model)
    topology = read_topology(nodes) if nodes is not None else _running_nodes() or _this_machine()
    asked = request_on_ray(shape, Workload(min(shape.max_context, 8192) if context is None else context, sequences))
    request = replace(
        asked,
        replicas=replicas,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        cores_per_rank=asked.cores_per_rank if cores_per_rank is None else cores_per_rank,
        # A file names all memory of its machines, of which Ray will not offer all.
        node_memory_share=asked.node_memory_share if nodes is None else NODE_MEMORY_SHARE,
        loads=_loads(load, model, shape),
        redundant_experts=redundant,
    )
    judged = _loads(judge, model, shape) or request.loads
    if context is None:
        made, request = plan_with_fitting_context(topology, request)
    else:
        made = make_plan(topology, request)
    if emit is not None:
        if as_json:
            raise typer.BadParameter("--emit writes YAML; leave --json out.")
        from services.kuberay.emit import emit as write_manifests

        put(write_manifests(topology, made, request.work, command_line(invocation)))
        return
    judged_by = f"judged by {judge}" if judge is not None else "by the load that it was planned from"
    if svg is not None:
        title = command_line(invocation).replace(f" --svg {shlex.quote(str(svg))}", "")
        save_svg(svg, title, lambda on: print_plan(on, topology, made, judged, judged_by))
    if as_json:
        put_json(plan_data(made, judged))
        return
    print_plan(Console(), topology, made, judged, judged_by)
    say("Nothing was started. Other machines: --nodes FILE; data for scripts: --json.")


def _loads(path: Path | None, model: str, shape: ModelShape) -> ExpertLoads | None:
    from cluster.known_shapes import checkpoint_of
    from cluster.routing_trace import read_trace

    return None if path is None else read_trace(path).loads_for(shape, checkpoint_of(model, data_folder()))


def _running_nodes() -> Topology | None:
    """The nodes of the windfarm that runs on the data folder: a plan for them can be applied."""
    from services.node_layout import running_topology
    from services.supervisor import status

    try:
        found = running_topology(status(data_folder()))
    except NotRunning:
        return None
    return found if found.nodes else None


def _this_machine() -> Topology:
    """The machine that this runs on, as `windfarm up` would start its node here."""
    from cluster.topology import Topology
    from services.graphics_cards import label_of, read_cards
    from services.local_network import loopback_seats
    from services.node_layout import node_options, planned_topology
    from services.preflight import read_machine

    machine = read_machine()
    cards = read_cards(machine.num_gpus)
    (node,) = planned_topology(node_options(machine, Path(), loopback_seats(1), label_of(cards))).nodes
    named = tuple(replace(each, kind=card.kind) for each, card in zip(node.accelerators, cards, strict=True))
    return Topology((replace(node, name="this machine", accelerators=named),))
