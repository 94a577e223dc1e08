"""`experts`: which experts of a mixture do the work, as a heat map, as data, or as a routing trace for `plan`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption
from services.cli.output import put_json, say
from services.cli.svg import SvgOption, save_svg
from services.setup_errors import ConfigError

if TYPE_CHECKING:
    from services.api_client import ApiClient
    from services.expert_counts import ModelExperts


def experts(
    model: Annotated[
        str | None, typer.Argument(help="The model's name.", show_default="the one that has experts")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="TRACE", help="Write a routing trace, for `windfarm plan --load`.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show what comes from now on, until ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="With --watch: seconds between two readings.")] = 2.0,
    svg: SvgOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how much each expert of a mixture does, how even its ranks are, and which experts are chosen together."""
    from rich.console import Console

    from cluster.routing_trace import RoutingTrace, write_trace
    from services.cli.client import open_client
    from services.expert_counts import experts_json
    from services.experts_view import picture

    client = open_client(home, api, key)
    reading = _read(client, model or _only_model(client))
    if watch:
        reading = _watch(client, reading, every)
    if save is not None:
        write_trace(save, RoutingTrace(reading.model, reading.checkpoint, reading.total))
        say(f"Saved {reading.total.num_tokens} tokens' routes: windfarm plan MODEL --load {save}")
    if svg is not None:
        save_svg(svg, f"windfarm experts {reading.model}", lambda on: on.print(picture(reading)), width=80)
    if as_json:
        put_json(experts_json(reading))
    elif not watch:
        Console().print(picture(reading))
    for silence in reading.silent:
        say(f"Note: replica {silence.replica_id} is not in these counts: {silence.reason}")


def _only_model(client: ApiClient) -> str:
    models = client.expert_models()
    sparse = [entry["model"] for entry in models if entry["has_experts"]]
    if len(sparse) == 1:
        return str(sparse[0])
    if sparse:
        raise ConfigError(f"Several models have experts. Name one: {', '.join(sparse)}.")
    reasons = " ".join(str(entry["reason"]) for entry in models)
    raise ConfigError(f"No model that runs here has experts. {reasons}".strip())


def _read(client: ApiClient, model: str) -> ModelExperts:
    from services.expert_counts import experts_from_json

    answer = client.experts(model)
    if not answer.get("gangs"):
        raise ConfigError(str(answer["reason"]))
    return experts_from_json(answer)


def _watch(client: ApiClient, first: ModelExperts, every: float) -> ModelExperts:
    """Redraw until ctrl-C; returns what came since `first`."""
    from rich.live import Live

    from services.experts_view import picture

    latest = first.minus(first)
    with Live(picture(latest), refresh_per_second=4) as live:
        try:
            while True:
                time.sleep(every)
                latest = _read(client, first.model).minus(first)
                live.update(picture(latest))
        except KeyboardInterrupt:
            return latest
