"""Fetches checkpoints and single GGUF files from a hub (huggingface.co or the address in HF_ENDPOINT)."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.catalogue import ResolvedModel, folder_format
from cluster.errors import ModelNotFound
from cluster.home import Home, explain_disk_errors
from cluster.weights.recipes import Report

_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*", "1_Pooling/*"]


def fetch_from_hub(model: ResolvedModel, home: Home, report: Report) -> Path:
    """Download what is missing into the data folder; the library verifies, resumes and locks by itself."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    assert model.repository is not None, "models of a hub have a repository"
    cache = home.models / "hub"
    # Given by name: without it the library sends none, since implicit tokens are off for all our processes.
    token = os.environ.get("HF_TOKEN") or None
    report(f"fetching {model.repository}", 0.0)
    with explain_disk_errors(cache):
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


def _why_not_reached() -> str:
    """The library reports its offline mode and a dead network as the same error; the next step differs."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, since HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. Unset it"
    return "the hub cannot be reached. Check the network and the proxy variables, set HF_ENDPOINT to a mirror"


_REFUSED = "Check owner and name; for a gated model accept its licence on the hub and set HF_TOKEN."
