"""Saves what a command draws in the terminal as a picture (SVG), for reports and for the README."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.setup_errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

SvgOption = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Save the picture as SVG as well.")]

# rich lets a font be loaded from the network.
_FONT_FACES = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)
# Lines; a longer drawing is not cut. Given so that the width is not taken from the terminal.
_HEIGHT = 50


def save_svg(path: Path, title: str, draw: Callable[[Console], None], width: int = 110) -> None:
    """Write what `draw` prints to a console of `width` columns. The same drawing gives the same file."""
    from rich.console import Console

    # Size and colours of the picture do not depend on the terminal of the moment.
    console = Console(
        file=StringIO(),
        record=True,
        width=width,
        height=_HEIGHT,
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
    )
    draw(console)
    try:
        path.write_text(_FONT_FACES.sub("", console.export_svg(title=title)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The picture {path} cannot be written ({error.strerror}).") from error
