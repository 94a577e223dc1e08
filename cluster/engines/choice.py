"""Which engine runs a model here, and in which format it needs the model. The decision is pure; engines are imported
only when one is made, because an unused one costs seconds and memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from cluster.catalogue import Format, ResolvedModel
from cluster.engine import Engine
from cluster.engines.settings import EngineSettings
from cluster.errors import ClusterError

EngineKind = Literal["vllm", "llamacpp", "remote"]
_FORMAT: Mapping[str, Format] = {"vllm": "hf", "llamacpp": "gguf"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """What matters of a machine for the choice of an engine."""

    has_gpu: bool
    has_vllm: bool


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """`model_format` is what the engine wants to load; none for a remote API."""

    engine: EngineKind
    model_format: Format | None
    uses_gpu: bool


def detect_hardware() -> Hardware:
    """Looks at device files only. GPUs that are hidden from this process do not count."""
    visible = visible_devices()
    hidden = os.environ.get("HIP_VISIBLE_DEVICES") in ("", "-1") if visible is None else not visible
    has_device = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    has_vllm = importlib.util.find_spec("vllm") is not None
    return Hardware(has_gpu=has_device and not hidden, has_vllm=has_vllm)


def visible_devices() -> tuple[str, ...] | None:
    """Indices and UUIDs of the NVIDIA GPUs that this process may use; none: all. As CUDA reads the variable, what comes
    after an entry that names no device is not visible."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    entries = (entry.strip() for entry in given.split(","))
    return tuple(dict.fromkeys(takewhile(lambda e: e.isdecimal() or e.startswith(("GPU-", "MIG-")), entries)))


def choose_engine(
    model: ResolvedModel, hardware: Hardware, wanted: Literal["auto", "vllm", "llamacpp", "remote"] = "auto"
) -> EngineChoice:
    """auto: a URL is remote; vLLM where there is a GPU; llama.cpp for a GGUF on CPU; vLLM on CPU for the rest."""
    if model.origin == "remote" or wanted == "remote":
        return _remote(model, wanted)
    if wanted == "auto":
        wanted = _automatic(model, hardware)
    model_format = _FORMAT[wanted]
    if model_format not in model.formats:
        raise ClusterError(
            f"{model.source!r} comes as {' and '.join(model.formats)}, but engine: {wanted} needs {model_format}. "
            "Use engine: auto, or name the model in the other format."
        )
    if wanted == "vllm" and not hardware.has_vllm:
        raise ClusterError(
            f"{model.source!r} needs vLLM, which is not installed here. Run `make setup` where PyTorch's index can be "
            "reached, or use a GGUF file of this model."
        )
    return EngineChoice(wanted, model_format, uses_gpu=hardware.has_gpu and wanted == "vllm")


def make_engine(choice: EngineChoice, settings: EngineSettings) -> Engine:
    """The engine, not yet started."""
    if settings.parallelism.num_ranks > 1 and choice.engine != "vllm":
        raise ClusterError(
            f"{settings.model} cannot be cut into {settings.parallelism.num_ranks} ranks with engine: {choice.engine}. "
            "Use engine: vllm, or replicas."
        )
    match choice.engine:
        case "llamacpp":
            from cluster.engines.llamacpp import LlamaCppEngine

            return LlamaCppEngine(settings)
        case "vllm":
            from cluster.engines.vllm import VllmEngine

            return VllmEngine(settings)
        case "remote":
            from cluster.engines.remote import RemoteEngine

            return RemoteEngine(settings)


def _remote(model: ResolvedModel, wanted: str) -> EngineChoice:
    if model.origin != "remote":
        raise ClusterError(f"engine: remote needs a URL as source, not {model.source!r}. Write https://host/v1.")
    if wanted not in ("auto", "remote"):
        raise ClusterError(f"{model.source!r} is a remote API: use engine: auto or engine: remote, not {wanted}.")
    return EngineChoice("remote", None, uses_gpu=False)


def _automatic(model: ResolvedModel, hardware: Hardware) -> Literal["vllm", "llamacpp"]:
    if hardware.has_gpu and hardware.has_vllm and "hf" in model.formats:
        return "vllm"
    return "llamacpp" if "gguf" in model.formats else "vllm"
