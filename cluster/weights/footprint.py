"""What is known of a model before it is loaded: the size of its weights, and what they say of the key-value cache.

Files that are on this machine are looked at; of a model that a hub still has to give, the hub is asked for sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.catalogue import CatalogueEntry, Format, ResolvedModel, resolve
from cluster.engines.memory import CacheFacts, facts_of_config, facts_of_gguf, facts_of_shape, read_model_config
from cluster.known_shapes import KNOWN_SHAPES
from cluster.weights.hub import ask_weight_bytes, fetched_path

_UNKNOWN = CacheFacts(bytes_per_token=None, trained_context=None)
_NOT_TOLD = CacheFacts(bytes_per_token=0, trained_context=None)


@dataclass(frozen=True, slots=True)
class Footprint:
    """`weight_bytes` is `None` where neither files nor hub told it, `is_here` says whether the files did."""

    weight_bytes: int | None
    cache: CacheFacts
    is_here: bool = True


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
        is_gguf = local.formats == ("gguf",)
        facts = facts_of_gguf(local.path) if is_gguf else facts_of_config(read_model_config(local.path))
        return Footprint(local.num_bytes, facts)
    if ask_hub:
        return Footprint(ask_weight_bytes(model), _NOT_TOLD, is_here=False)
    return Footprint(None, _UNKNOWN, is_here=False)


def _fetched(model: ResolvedModel, root: Path) -> ResolvedModel | None:
    path = fetched_path(model, root / "models" / "hub")
    return resolve(str(path)) if path is not None else None


def _of_entry(entry: CatalogueEntry, model_format: Format) -> Footprint:
    shape = KNOWN_SHAPES.get(entry.name)
    weights = 2 * entry.num_parameters if model_format == "hf" else entry.file.num_bytes
    return Footprint(weights, facts_of_shape(shape) if shape else _UNKNOWN)
