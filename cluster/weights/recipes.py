"""How each model of the catalogue becomes files that an engine can load: one recipe per model and format.

A recipe builds into an empty folder and then checks its own result; locking, checksums and moving the folder into
place are done elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.catalogue import EMBED, SMALL, TINY, CatalogueEntry, Format

Report = Callable[[str, float], None]
"""Takes what is being done and how far it is (0 to 1)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """`main` is the file that the engine is pointed to; none: the folder itself. `num_bytes`: disk needed."""

    entry: CatalogueEntry
    format: Format
    revision: int
    num_bytes: int
    build: Callable[[Path, Path, Report], None]
    main: str | None = None


def _build_tiny_gguf(source: Path, folder: Path, report: Report) -> None:
    # A copy and no hard link: damage to one of them must not reach the other.
    report("copying", 0.1)
    shutil.copyfile(source, folder / TINY_GGUF)


def _build_tiny_hf(source: Path, folder: Path, report: Report) -> None:
    from cluster.weights.llama_checkpoint import write_llama_checkpoint

    report("unpacking the weights", 0.1)
    write_llama_checkpoint(source, folder)


def _build_small_hf(source: Path, folder: Path, report: Report) -> None:
    """Identical experts: the mixture answers as well as its parent, while with distinct ones (seeded noise, nothing is
    trained) it can only be worse. The router is random and differs by layer, so that experts have unequal load, as in
    a trained mixture."""
    from cluster.weights.checkpoint_check import check_checkpoint
    from cluster.weights.llama_checkpoint import write_llama_checkpoint
    from cluster.weights.upcycle import MixtureRecipe, upcycle

    parent, made = folder / "parent", folder / "made"
    parent.mkdir()
    report("unpacking the parent", 0.05)
    write_llama_checkpoint(source, parent)
    upcycle(parent, made, MixtureRecipe(), lambda done, total: report("making the experts", 0.3 + 0.4 * done / total))
    report("checking the tensors", 0.85)
    check_checkpoint(made)
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()
    shutil.rmtree(parent)


def _build_embed_hf(source: Path, folder: Path, report: Report) -> None:
    from cluster.weights.e5_check import check_e5_checkpoint
    from cluster.weights.e5_checkpoint import write_e5_checkpoint
    from cluster.weights.e5s1 import read_e5s1

    report("reading", 0.05)
    model = read_e5s1(source)
    report("converting", 0.15)
    write_e5_checkpoint(model, folder)
    report("checking known vectors", 0.7)
    check_e5_checkpoint(folder)


def _build_embed_gguf(source: Path, folder: Path, report: Report) -> None:
    from cluster.weights.e5_check import check_e5_gguf
    from cluster.weights.e5_gguf import write_e5_gguf
    from cluster.weights.e5_tokenizer import write_e5_tokenizer
    from cluster.weights.e5s1 import read_e5s1

    report("reading", 0.05)
    model = read_e5s1(source)
    report("converting", 0.15)
    write_e5_gguf(model, folder / EMBED_GGUF, "q4_0")
    write_e5_tokenizer(model.vocabulary, folder, model.shape.max_positions)
    report("checking known vectors", 0.7)
    check_e5_gguf(folder / EMBED_GGUF)


TINY_GGUF = "smollm2-135m-instruct-q4_1.gguf"
EMBED_GGUF = "multilingual-e5-small-q4_0.gguf"

RECIPES: tuple[Recipe, ...] = (
    Recipe(TINY, "gguf", 1, 100_000_000, _build_tiny_gguf, TINY_GGUF),
    Recipe(TINY, "hf", 2, 280_000_000, _build_tiny_hf),
    Recipe(SMALL, "hf", 1, 1_750_000_000, _build_small_hf),
    Recipe(EMBED, "gguf", 1, 90_000_000, _build_embed_gguf, EMBED_GGUF),
    Recipe(EMBED, "hf", 1, 250_000_000, _build_embed_hf),
)


def find_recipe(entry: CatalogueEntry, model_format: Format) -> Recipe:
    return next(r for r in RECIPES if r.entry.name == entry.name and r.format == model_format)
