"""Options that several commands share, and what they mean when they are not given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from services.setup_errors import ConfigError

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Data folder.", envvar="WINDFARM_HOME", show_default="~/.local/share/windfarm"),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file.", envvar="WINDFARM_CONFIG", show_default="ray_config.yaml"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
ApiOption = Annotated[
    str | None,
    typer.Option("--api", help="Address of a windfarm.", envvar="WINDFARM_API", show_default="the one on --home"),
]
KeyOption = Annotated[
    str | None, typer.Option("--key", help="Api key.", envvar="WINDFARM_KEY", show_default="the owner's, from --home")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Chat model.", show_default="the server's default")
]


def home_of(option: Path | None) -> Path:
    """The data folder; not created here. Set for what reads it from the environment later on."""
    from services.environment import data_folder

    if option is not None:
        os.environ["WINDFARM_HOME"] = str(option.expanduser().absolute())
    return data_folder()


def config_path_of(option: Path | None) -> Path:
    """The named file, else `ray_config.yaml` here, else the one that comes with windfarm."""
    if option is not None:
        return option.expanduser().absolute()
    bundled = Path(__file__).resolve().parents[2] / "ray_config.yaml"
    for path in (Path.cwd() / "ray_config.yaml", bundled):
        if path.is_file():
            return path
    raise ConfigError("There is no ray_config.yaml here. Name one with --config.")
