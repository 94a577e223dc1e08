"""Embeddings with PyTorch: a checkpoint folder in this process, in bf16 on CPUs that compute it and on GPUs, in int8 on
other CPUs.

Texts of a call are padded to the longest of them: hand in texts of similar length.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.engines.embedding import Pooling, Vectors, normalise
from cluster.errors import EngineDead, EngineFailed, ModelDamaged

_log = logging.getLogger(__name__)

TorchPrecision = Literal["bf16", "fp32"]
ALONE_TOKENS = 48
"""So many tokens or fewer are computed by one thread on CPUs: a question is done before other threads, which the
processes around them also want, have met at each of its barriers. Measured with a small encoder (BENCHMARKS)."""
ALONE_WIDTH = 512
"""Wider models have enough to share out also for a question."""


class TorchEmbedding:
    """One encoder checkpoint. `threads` compute what is more than a question."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        pooling: Pooling = "mean",
        precision: TorchPrecision = "bf16",
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        import torch
        from transformers import AutoModel

        torch.set_num_threads(threads)
        self._threads = threads
        self.backend = f"torch-{precision}" + ("-cuda" if device == "cuda" else "")
        self._pooling = pooling
        self._device = device
        try:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            model: Any = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
            model = model.to(device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelDamaged(f"PyTorch cannot load {folder}: {error}") from error
        self._dimension = int(model.config.hidden_size)
        self._pad = int(model.config.pad_token_id or 0)
        self._model: Any = _packed_or_same(model) if precision == "bf16" and device == "cpu" else _States(model)

    @property
    def dimension(self) -> int:
        return self._dimension

    def embed(self, token_ids: Sequence[Sequence[int]]) -> Vectors:
        if self._model is None:
            raise EngineDead("The embedding engine was closed.")
        if not token_ids:
            return np.zeros((0, self._dimension), dtype=np.float32)
        try:
            return normalise(self._pooled(token_ids))
        except RuntimeError as error:
            raise EngineFailed(f"PyTorch could not embed: {error}") from error

    def quantize(self) -> None:
        """Compute the linear layers of a float32 checkpoint in int8 from now on. CPU only."""
        from cluster.engines.embedding_int8 import quantize

        quantize(self._model.model)
        self.backend = "torch-int8"

    def close(self) -> None:
        self._model = None

    def _pooled(self, token_ids: Sequence[Sequence[int]]) -> Vectors:
        import torch

        longest = max(len(ids) for ids in token_ids)
        padded = torch.full((len(token_ids), longest), self._pad, dtype=torch.long)
        mask = torch.zeros((len(token_ids), longest), dtype=torch.long)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask[row, : len(ids)] = 1
        if self._device == "cpu":
            is_alone = padded.numel() <= ALONE_TOKENS and self._dimension <= ALONE_WIDTH
            torch.set_num_threads(1 if is_alone else self._threads)
        with torch.inference_mode():
            mask = mask.to(self._device)
            states = self._model(padded.to(self._device), mask).float()
            if self._pooling == "cls":
                pooled = states[:, 0]
            else:
                weights = mask.unsqueeze(-1).float()
                pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
            vectors: Vectors = pooled.cpu().numpy()
            return vectors


class _States:
    """A model of Transformers as a function of token ids and mask, both (texts, tokens), to its last states."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, token_ids: Any, mask: Any) -> Any:
        return self.model(input_ids=token_ids, attention_mask=mask).last_hidden_state


def _packed_or_same(model: Any) -> Any:
    from cluster.engines.embedding_bert import pack

    packed = pack(model)
    if packed is None:
        _log.info("%s cannot be packed here and computes as it is.", type(model).__name__)
    return packed or _States(model)
