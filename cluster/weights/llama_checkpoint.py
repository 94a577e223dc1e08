"""Unpacks a Llama-like GGUF file into a standard checkpoint (config.json, safetensors in bf16, tokenizer) for vLLM.

Transformers does the reading; it needs torch, so this runs only where the full profile is installed.
"""

from __future__ import annotations

from pathlib import Path

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
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
