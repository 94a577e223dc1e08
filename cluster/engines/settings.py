"""What every engine is told when it is made. Values, not decisions: those are taken before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.engines.parallelism import Parallelism


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`location` is a .gguf file, a checkpoint's folder, or the URL of a remote API (up to and with `/v1`)."""

    model: str
    location: Path | str
    max_context: int | None = None
    parallel_requests: int = 4
    max_queued_requests: int = 64
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    remote_model: str | None = None
    remote_key: str | None = None
    parallelism: Parallelism = field(default_factory=Parallelism)
    """Only vLLM can be cut into ranks; other engines are not made with more than one."""
