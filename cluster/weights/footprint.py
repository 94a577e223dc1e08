"""What is known of a model before it is loaded: the size of its weights, and what they say of the key-value cache.

Files that are on this machine are looked at; of a model that a hub still has to give, the hub is asked for sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.catalogue import CatalogueEntry, Format, ResolvedModel, resolve
from cluster.engines.memory import CacheFacts, facts_of_config, facts_of_gguf, facts_of_shape, read_model_config
from cluster.errors import ModelDamaged
from cluster.known_shapes import KNOWN_SHAPES
from cluster.sizing import ModelShape, shape_from_config
from cluster.weights.hub import ask_weight_bytes, fetched_path

_KNOWN_KINDS = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3"})
_UNKNOWN = CacheFacts(bytes_per_token=None, trained_context=None)
_NOT_TOLD = CacheFacts(bytes_per_token=0, trained_context=None)


@dataclass(frozen=True, slots=True)
class Footprint:
    """`weight_bytes` is `None` where neither files nor hub told it, `is_here` says whether the files did. `shape` is
    that of a checkpoint of a kind that is known to the last tensor, in half precision or more."""

    weight_bytes: int | None
    cache: CacheFacts
    is_here: bool = True
    shape: ModelShape | None = None


def footprint_of(model: ResolvedModel, model_format: Format, root: Path, *, ask_hub: bool) -> Footprint:
    """`root` is the data folder. Raises `ModelDamaged` where a file says nonsense.

    What a hub has not given yet counts as little as it may be where the hub is asked, so that nobody is refused who
    could have it; elsewhere as engines commonly take.
    """
    if model.entry is not None:
        return _of_entry(model.entry, model_format)
    local = model if model.path is not None else _fetched(model, root)
    if local is not None:
        assert local.path is not None, "files of this machine have a path"
        if local.formats == ("gguf",):
            return Footprint(local.num_bytes, facts_of_gguf(local.path))
        config = read_model_config(local.path)
        return Footprint(local.num_bytes, facts_of_config(config), shape=_shape_of(config, model.name))
    if ask_hub:
        return Footprint(ask_weight_bytes(model), _NOT_TOLD, is_here=False)
    return Footprint(None, _UNKNOWN, is_here=False)


def _fetched(model: ResolvedModel, root: Path) -> ResolvedModel | None:
    path = fetched_path(model, root / "models" / "hub")
    return resolve(str(path)) if path is not None else None


def _of_entry(entry: CatalogueEntry, model_format: Format) -> Footprint:
    shape = KNOWN_SHAPES.get(entry.name)
    weights = 2 * entry.num_parameters if model_format == "hf" else entry.file.num_bytes
    facts = facts_of_shape(shape) if shape else _UNKNOWN
    return Footprint(weights, facts, shape=shape if model_format == "hf" else None)


def _shape_of(config: Mapping[str, Any], name: str) -> ModelShape | None:
    """None for other kinds, whose layers may have more than these numbers say, and for quantized weights."""
    if config.get("model_type") not in _KNOWN_KINDS or config.get("quantization_config"):
        return None
    try:
        return shape_from_config(config, name=name)
    except ModelDamaged:
        return None  # a config that lacks a number is refused where it must be complete
