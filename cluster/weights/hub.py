"""Fetches checkpoints and single GGUF files from a hub (huggingface.co or the address in HF_ENDPOINT), and says how
large they are before that."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from cluster.catalogue import ResolvedModel, folder_format, weight_files
from cluster.errors import ModelNotFound
from cluster.home import Home, explain_disk_errors
from cluster.weights.recipes import Report

_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*", "1_Pooling/*"]
# An answer of some kilobytes: who waits longer for it will not fetch gigabytes either.
_ASK_TIMEOUT_S = 10.0
_LOOK_S = 0.3


def fetch_from_hub(model: ResolvedModel, home: Home, report: Report) -> Path:
    """Download what is missing into the data folder; the library verifies, resumes and locks by itself."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    assert model.repository is not None, "models of a hub have a repository"
    cache = home.models / "hub"
    # Given by name: without it the library sends none, since implicit tokens are off for all our processes.
    token = os.environ.get("HF_TOKEN") or None
    report(f"fetching {model.repository}", 0.0)
    with explain_disk_errors(cache), _watched(model, cache, report):
        try:
            if model.filename:
                path = hf_hub_download(
                    model.repository, model.filename, revision=model.revision, cache_dir=cache, token=token
                )
            else:
                path = snapshot_download(
                    model.repository,
                    revision=model.revision,
                    cache_dir=cache,
                    allow_patterns=_CHECKPOINT_FILES,
                    token=token,
                )
        except HfHubHTTPError as error:
            raise ModelNotFound(f"The hub does not give {model.repository}: {error}. {_REFUSED}") from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
            raise ModelNotFound(
                f"{model.repository} is not on this machine and {_why_not_reached()}, or download the model elsewhere"
                " and name its folder as the source."
            ) from error
    report("ready", 1.0)
    if not model.filename:
        folder_format(Path(path))
    return Path(path)


@contextmanager
def _watched(model: ResolvedModel, cache: Path, report: Report) -> Iterator[None]:
    """Report meanwhile how many bytes are there, where the hub tells how many there will be: what lies in the folder is
    the same however the library fetches, and in one bar beside those of other models."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    total = ask_weight_bytes(model)
    if total is None:
        yield
        return
    assert model.repository is not None, "models of a hub have a repository"
    folder = cache / f"models--{model.repository.replace('/', '--')}" / "blobs"
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_LOOK_S):
            num_bytes = min(total, sum(_size(path) for path in folder.glob("*")))
            report(f"fetching {model.repository}: {num_bytes / 1e9:.2f} of {total / 1e9:.2f} GB", num_bytes / total)

    watcher = threading.Thread(target=watch, name="hub watcher", daemon=True)
    was_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        if not was_disabled:
            enable_progress_bars()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed when it was whole
        return 0


def fetched_path(model: ResolvedModel, cache: Path) -> Path | None:
    """What `fetch_from_hub` has made of this model, if it is all there. The network is not touched."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert model.repository is not None, "models of a hub have a repository"
    if not cache.is_dir():
        return None
    if model.filename:
        found = try_to_load_from_cache(model.repository, model.filename, cache_dir=cache, revision=model.revision)
        return Path(found) if isinstance(found, str) else None
    try:
        folder = snapshot_download(
            model.repository,
            revision=model.revision,
            cache_dir=cache,
            allow_patterns=_CHECKPOINT_FILES,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


@lru_cache(maxsize=64)
def ask_weight_bytes(model: ResolvedModel) -> int | None:
    """Size of the weights that would be fetched; `None` where the hub does not tell, which fetching them explains."""
    import httpx2  # whose errors this call of the library lets through
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    assert model.repository is not None, "models of a hub have a repository"
    try:
        info = HfApi().model_info(
            model.repository,
            revision=model.revision,
            files_metadata=True,
            timeout=_ASK_TIMEOUT_S,
            token=os.environ.get("HF_TOKEN") or False,
        )
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, ConnectionError):
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if model.filename:
        return sizes.get(model.filename)
    names = weight_files([name for name in sizes if name.endswith(".safetensors") and "/" not in name])
    return sum(sizes[name] for name in names) or None


def _why_not_reached() -> str:
    """The library reports its offline mode and a dead network as the same error; the next step differs."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, since HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. Unset it"
    return "the hub cannot be reached. Check the network and the proxy variables, set HF_ENDPOINT to a mirror"


_REFUSED = "Check owner and name; for a gated model accept its licence on the hub and set HF_TOKEN."
