"""`up`, `down`, `apply`, `status`, `logs`: the life of a windfarm."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import ConfigOption, HomeOption, JsonOption, config_path_of, home_of
from services.cli.output import put, put_json, say
from services.setup_errors import NotRunning

if TYPE_CHECKING:
    from services.accounts import OwnerKey
    from services.supervisor import Running
    from services.up_options import UpOptions


def up(
    config: ConfigOption = None,
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.", show_default="8000")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each model.", show_default="all cores")
    ] = None,
    local_nodes: Annotated[
        int, typer.Option(min=1, max=32, help="Nodes of Ray on this machine, each with its share of cores and memory.")
    ] = 1,
    namespaces: Annotated[
        bool | None,
        typer.Option(
            "--namespaces/--no-namespaces",
            help="With several nodes: give each a network of its own.",
            show_default="where it is possible (root, `ip netns`)",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="NAME=VALUE",
            help="Label of Ray's head, such as windfarm/accelerator-memory-gb=80 for GPUs that are not known.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready; end with `down`.")] = False,
    as_json: JsonOption = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until it is ready.")] = 900,
) -> None:
    """Start everything and wait until it answers. Ctrl-C ends it, unless detached."""
    from services import supervisor
    from services.cli.up_display import Display, prepare_models
    from services.ray_config import load_ray_config
    from services.up_options import UpOptions

    options = UpOptions(
        home_of(home),
        load_ray_config(config_path_of(config)),
        host,
        port,
        threads,
        num_local_nodes=local_nodes,
        use_namespaces=namespaces,
        labels=_labels(label or []),
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    running: Running | None = None
    is_ready = is_kept = False
    try:
        with Display() as display:
            running = supervisor.start(options, display.say, prepare_models)
            key = supervisor.prepare_database(running)
            supervisor.wait_until_ready(running, options, display.show, timeout)
        is_ready = True
        _announce(running.state.api, options, key, as_json=as_json, detach=detach)
        if detach:
            running.keep()
            is_kept = True
        else:
            _stay(running)
    except KeyboardInterrupt:
        say("Stopping")
        if not is_ready:
            raise typer.Exit(130) from None
    finally:
        if running is not None and not is_kept:
            with contextlib.suppress(NotRunning):  # `down` was faster
                supervisor.stop(options.home)
            say("Stopped: nothing of it is left running.")


def _labels(given: list[str]) -> dict[str, str]:
    """Refuses what is not NAME=VALUE."""
    pairs = [entry.partition("=") for entry in given]
    wrong = next((entry for entry, (name, _, value) in zip(given, pairs, strict=True) if not name or not value), None)
    if wrong is not None:
        raise typer.BadParameter(f"--label wants NAME=VALUE, not {wrong!r}.")
    return {name: value for name, _, value in pairs}


def _announce(api: str, options: UpOptions, key: OwnerKey, *, as_json: bool, detach: bool) -> None:
    """A terminal shows the key once, when it is new: later ones may be watched or logged."""
    if as_json:
        put_json({"ui": f"{api}/", "api": f"{api}/v1", "key": key.key}, one_line=True)
        return
    shown = key.key if key.is_new else "that of the first start; `windfarm key` prints it"
    put(f"windfarm is ready.\n  page  {api}/\n  api   {api}/v1\n  key   {shown}")
    if not options.is_local:
        say(f"Note: {options.address[0]} can be reached from the network, without encryption. Keep the key secret.")
    if not detach:
        say("Ctrl-C ends it. Logs: windfarm logs")


def _stay(running: Running) -> None:
    """Until a signal comes or windfarm ends by itself."""
    code = running.guardian.wait()
    if code:
        say(f"windfarm ended unexpectedly; see {running.home.logs / 'windfarm.log'}")
        sys.exit(1)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def down(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """End the windfarm of a data folder with everything that it started."""
    from services import supervisor

    supervisor.stop(home_of(home))
    if as_json:
        put_json({"stopped": True})
    else:
        say("Stopped: nothing of it is left running.")


def apply(
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until the change has taken effect.")] = 600,
) -> None:
    """Bring a changed ray_config.yaml or changed code (after `git pull`) to a running windfarm, without a failed
    request; what has not changed goes on."""
    from services import rolling
    from services.cli.up_display import Display, prepare_models
    from services.ray_config import load_ray_config

    loaded = load_ray_config(config_path_of(config))
    with Display() as display:
        status_ = rolling.apply(home_of(home), loaded, display.say, display.show, timeout, prepare_models)
    if as_json:
        put_json(status_)
    else:
        say("Applied.")


def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Applications, replicas and nodes; what is pending and why; collections and how often they refuse wrongly."""
    from services import supervisor
    from services.cli.status_view import collections_of

    answer = supervisor.status(home_of(home))
    answer["collections"] = collections_of(home) if answer["is_ready"] else []
    if as_json:
        put_json(answer)
    else:
        from services.cli.status_view import render

        render(answer)


def logs(
    application: Annotated[str | None, typer.Argument(help="For example llm-tiny; all when left out.")] = None,
    home: HomeOption = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="Lines of each file.")] = 40,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more is written.")] = False,
) -> None:
    """The end of the logs, of one application or of all."""
    from services.log_files import follow_files, last_lines, log_files

    files = log_files(home_of(home), application)
    for name, path in files:
        for line in last_lines(path, lines):
            put(f"{name}: {line}")
    if follow:
        try:
            follow_files(files, put)
        except KeyboardInterrupt:
            return
