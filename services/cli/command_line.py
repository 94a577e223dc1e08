"""Spells a command out again from its parsed options, so that what it wrote can say how to write it again."""

from __future__ import annotations

import shlex

import typer


def command_line(context: typer.Context) -> str:
    """The command with the options that differ from their defaults, as one would type it."""
    words = ["windfarm", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value is None or value == parameter.default:
            continue
        words += [str(value)] if parameter.param_type_name == "argument" else [parameter.opts[0], str(value)]
    return shlex.join(words)
