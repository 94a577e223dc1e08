"""Routing traces: what a model's experts did during some time, in a file that plans are made from and judged on.

A trace names its model by the fingerprint of the checkpoint, so that it cannot be taken for another one's. It is one
JSON document; a file that was cut or changed contradicts itself and is refused.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import LoadError, PlanError
from cluster.expert_load import ExpertLoad
from cluster.plan import ExpertLoads
from cluster.sizing import ModelShape

FORMAT = "windfarm routing trace"
VERSION = 1


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """`model` is the name that clients used. `checkpoint` is the fingerprint of its files; empty: not known."""

    model: str
    checkpoint: str
    load: ExpertLoad

    def loads_for(self, shape: ModelShape, checkpoint: str) -> ExpertLoads:
        """The measured load for planning `shape`, whose files have the fingerprint `checkpoint` (empty: not known).

        Raises `PlanError` for a trace of another model. Without both fingerprints the names must agree.
        """
        self._check_sizes(shape)
        if self.checkpoint and checkpoint:
            if self.checkpoint != checkpoint:
                raise PlanError(
                    f"This routing trace is of another checkpoint: {self.model} with fingerprint {self.checkpoint}, "
                    f"while {shape.name} has {checkpoint}. Record one of it with `windfarm experts --save`."
                )
        elif self.model != shape.name:
            raise PlanError(
                f"This routing trace is of the model {self.model!r}, not {shape.name!r}, and without the files of both "
                "they cannot be compared. Name the checkpoint's folder, or record a trace of this model."
            )
        return ExpertLoads(shape.name, tuple(tuple(int(count) for count in layer) for layer in self.load.tokens))

    def _check_sizes(self, shape: ModelShape) -> None:
        if not shape.is_sparse:
            raise PlanError(f"{shape.name} has no experts, so there is no expert load to plan with.")
        mine = (self.load.num_layers, self.load.num_experts, self.load.experts_per_token)
        theirs = (shape.num_layers, shape.num_experts, shape.experts_per_token)
        if mine != theirs:
            raise PlanError(
                f"This routing trace is of {self.model!r}: {mine[0]} layers of {mine[1]} experts, {mine[2]} per token. "
                f"{shape.name} has {theirs[0]} layers of {theirs[1]} experts, {theirs[2]} per token. Record one of it."
            )


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """Write the file whole or not at all; replaces an older one."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": trace.model,
        "checkpoint": trace.checkpoint,
        **trace.load.to_json(),
    }
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, separators=(",", ":"))
            file.write("\n")
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def read_trace(path: Path) -> RoutingTrace:
    """Raises `LoadError` for a file that is missing, damaged, no trace, or of a later version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"The routing trace {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise LoadError(f"The routing trace {path} is damaged or none at all ({error}). Record it again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LoadError(f"{path} is no routing trace. `windfarm experts --save FILE` records one.")
    if content.get("version") != VERSION:
        raise LoadError(
            f"The routing trace {path} has the version {content.get('version')!r}; this windfarm reads version "
            f"{VERSION}. Record it again, or update windfarm."
        )
    try:
        return RoutingTrace(_text(content, "model"), _text(content, "checkpoint"), load=ExpertLoad.from_json(content))
    except (LoadError, KeyError) as error:
        raise LoadError(f"The routing trace {path} is damaged: {error} Record it again.") from error


def _text(content: dict[str, Any], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str):
        raise LoadError(f"its {key!r} is missing or no text.")
    return value
