"""Embeddings with llama.cpp: a GGUF file in this process, for CPUs without fast 16-bit arithmetic.

The library always opens an HTTP port beside its in-process calls: it is bound to loopback and demands a random key that
nobody is told.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.engines.embedding import Pooling, Vectors, normalise
from cluster.engines.openmp import forbid_spinning
from cluster.errors import EngineDead, EngineFailed, ModelDamaged

_BATCH_TOKENS = 2048
"""Tokens computed in one pass: a few long texts or many short ones."""


class LlamaCppEmbedding:
    """One GGUF encoder. Texts of a call share passes of at most 2048 tokens."""

    def __init__(
        self, model: Path, *, threads: int, max_tokens: int, pooling: Pooling = "mean", precision: str = "gguf"
    ) -> None:
        forbid_spinning()
        import xllamacpp

        self.backend = f"llamacpp-{precision}"
        self._server: Any = None
        try:
            self._server = xllamacpp.Server(_parameters(model, threads, max_tokens, pooling))
        except (RuntimeError, ValueError) as error:
            raise ModelDamaged(f"llama.cpp cannot load {model}: {error}") from error
        self._dimension = self._ask([[0, 2]]).shape[1]

    @property
    def dimension(self) -> int:
        return self._dimension

    def embed(self, token_ids: Sequence[Sequence[int]]) -> Vectors:
        if self._server is None:
            raise EngineDead("The embedding engine was closed.")
        if not token_ids:
            return np.zeros((0, self._dimension), dtype=np.float32)
        return normalise(self._ask(token_ids))

    def close(self) -> None:
        self._server = None

    def _ask(self, token_ids: Sequence[Sequence[int]]) -> Vectors:
        try:
            answer = self._server.handle_embeddings({"input": [list(ids) for ids in token_ids]})
        except (RuntimeError, ValueError) as error:
            raise EngineFailed(f"llama.cpp could not embed: {error}") from error
        if not isinstance(answer, dict) or "data" not in answer:
            raise EngineFailed(f"llama.cpp could not embed: {answer}")
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return np.asarray([row["embedding"] for row in rows], dtype=np.float32)


def _parameters(model: Path, threads: int, max_tokens: int, pooling: Pooling) -> Any:
    import xllamacpp

    kinds = xllamacpp.llama_pooling_type
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.embedding = True
    params.pooling_type = kinds.LLAMA_POOLING_TYPE_MEAN if pooling == "mean" else kinds.LLAMA_POOLING_TYPE_CLS
    params.embd_normalize = 2
    params.n_ctx = max_tokens
    params.n_batch = params.n_ubatch = max(_BATCH_TOKENS, max_tokens)
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params = False
    params.warmup = False
    params.verbosity = 0
    params.cache_ram_mib = 0
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [secrets.token_urlsafe(32)]
    params.n_threads_http = 1
    params.ui = False
    params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
    return params
