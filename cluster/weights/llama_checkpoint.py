"""Unpacks a Llama-like GGUF file into a standard checkpoint (config.json, safetensors in bf16, tokenizer) for vLLM.

Transformers does the reading; it needs torch, so this runs only where the full profile is installed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from cluster.errors import ModelNotFound


def write_llama_checkpoint(source: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer with its chat template into an empty folder."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ModelNotFound(
            f"A checkpoint for vLLM is unpacked with torch and transformers, which are not installed here ({error}). "
            "Use the llamacpp engine, or install the full profile with: make setup"
        ) from error
    with _without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """SmolLM cuts numbers into single digits; Transformers forgets that when it reads a tokenizer from GGUF."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Ours is the only bar on the terminal. The reader of GGUF files draws its own past all settings."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()
