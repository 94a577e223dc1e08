"""Opens an embedding model with the backend that is fastest here and exact enough.

bf16 is only a candidate where the processor has instructions for it (elsewhere it is emulated and slow), int8 only
where its vectors are those of float32. A short probe times every backend that can run, also a single one; what it found
is kept, so that people see what was taken and why.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.catalogue import Format, ResolvedModel, resolve
from cluster.engines.embedding import EmbeddingEngine, EmbeddingSpec, read_embedding_spec
from cluster.engines.embedding_text import EmbeddingTokenizer
from cluster.errors import ModelNotFound
from cluster.home import Home
from cluster.weights.manifest import sha256_of
from cluster.weights.prepare import prepare

if TYPE_CHECKING:
    from cluster.engines.embedding_torch import TorchEmbedding

Precision = Literal["auto", "bf16", "gguf", "int8", "fp32"]
Device = Literal["cpu", "cuda"]

_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
_NO_BF16 = "the processor has neither AMX nor AVX512-BF16"
_ONLY_FP32 = (
    f"only a full checkpoint is there, {_NO_BF16} and int8 is no way out, so it runs in float32, which is slow: "
    "a .gguf file of the model with its tokenizer.json beside it is faster"
)
_MIN_COSINE = 0.99
"""Of a vector in int8 to the same in float32; below it int8 is not served."""
_CHECKED_TEXTS = (
    "query: How long is the notice period of the lease?",
    "passage: Il contratto puo essere disdetto con un preavviso di sei mesi.",
    "Die Lieferung umfasst 14 Rechner, drei Drucker und die Wartung bis zum 31. Dezember 2027.",
    "¿Quién firma el acuerdo?",
    "La facture n° 2041 (1 250,00 €) est payable sous trente jours; au-delà, des intérêts sont dus.",
    "def mean(values): return sum(values) / len(values)",
)
_PROBE_TEXTS = 4
_PROBE_TOKENS = 32
_PROBE_ROUNDS = 3
_PROBE_BUDGET_S = 0.3
"""On a busy machine the probe is content with fewer rounds, so that it never delays the start much."""


class _StraysTooFar(Exception):
    """A backend whose vectors are not those of the model."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a model here. `format` decides which files it needs."""

    name: str
    format: Format
    precision: Precision
    device: Device = "cpu"


@dataclass(frozen=True, slots=True)
class OpenedEmbedding:
    """A loaded model with all that belongs to it. `probe` holds texts per second of every backend that was timed.

    `identity` names the weights, so that vectors of different models are never compared. Backends of one model share
    it: their vectors agree.
    """

    identity: str
    engine: EmbeddingEngine
    spec: EmbeddingSpec
    tokenizer: EmbeddingTokenizer
    reason: str
    threads: int
    probe: dict[str, float] = field(default_factory=dict)


def open_embedding(source: str, home: Home, *, precision: Precision = "auto", threads: int) -> OpenedEmbedding:
    """Prepare, load, time and choose. Raises `ModelNotFound`, `ModelDamaged` or `HomeError`."""
    model = resolve(source)
    candidates, reason = candidates_here(model, precision, has_gpu=_has_gpu())
    try:
        best, probe = _fastest([_opener(model, home, candidate, threads) for candidate in candidates])
    except _StraysTooFar as error:
        raise ModelNotFound(f"The embedding model {source!r} cannot run so: {error}. Use precision: auto.") from error
    engine, path, spec = best
    if engine.backend == "torch-fp32" and precision == "auto":
        reason = _ONLY_FP32
    elif len(probe) > 1:
        reason = f"fastest of {len(probe)} in the probe"
    tokenizer = EmbeddingTokenizer(_folder_of(path), spec)
    return OpenedEmbedding(_identify(model, path), engine, spec, tokenizer, reason, threads, probe)


def candidates_here(model: ResolvedModel, precision: Precision, *, has_gpu: bool) -> tuple[list[Candidate], str]:
    """Backends worth loading on this machine, and why these. Raises `ModelNotFound` where there is none."""
    return list_candidates(model, precision, cpu_flags(), has_torch=_has("torch"), has_gpu=has_gpu)


def list_candidates(
    model: ResolvedModel, precision: Precision, flags: frozenset[str], *, has_torch: bool, has_gpu: bool
) -> tuple[list[Candidate], str]:
    """Backends worth loading, and why these."""
    as_gguf = Candidate("llamacpp", "gguf", "gguf")
    as_bf16 = Candidate("torch-bf16", "hf", "bf16", "cuda" if has_gpu else "cpu")
    as_int8 = Candidate("torch-int8", "hf", "int8")
    as_fp32 = Candidate("torch-fp32", "hf", "fp32", "cuda" if has_gpu else "cpu")
    known = (as_gguf, as_bf16, as_int8, as_fp32)
    usable = [c for c in known if c.format in model.formats and (c.format == "gguf" or has_torch)]
    if precision != "auto":
        chosen = [c for c in usable if c.precision == precision]
        return _at_least_one(chosen, model, precision), f"precision: {precision} in the configuration"
    if has_gpu and as_bf16 in usable:
        return [as_bf16], "a GPU is there"
    if flags & _BF16_FLAGS and as_bf16 in usable:
        return [c for c in usable if c in (as_gguf, as_bf16)], "the processor computes bf16"
    if as_gguf in usable:
        return [as_gguf], _NO_BF16
    return _at_least_one([c for c in usable if c in (as_int8, as_fp32)], model, precision), _NO_BF16


def cpu_flags() -> frozenset[str]:
    """What this processor can do, in the kernel's words; empty where the kernel does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


def probe_speed(engine: EmbeddingEngine) -> float:
    """Texts per second on short texts; the best of a few rounds, the first one not counted."""
    batch = [[0, *range(100, 100 + _PROBE_TOKENS - 2), 2]] * _PROBE_TEXTS
    began = time.perf_counter()
    engine.embed(batch)
    seconds: list[float] = []
    while not seconds or (len(seconds) < _PROBE_ROUNDS and time.perf_counter() - began < _PROBE_BUDGET_S):
        started = time.perf_counter()
        engine.embed(batch)
        seconds.append(time.perf_counter() - started)
    return _PROBE_TEXTS / min(seconds)


_Opened = tuple[EmbeddingEngine, Path, EmbeddingSpec]


def _fastest(openers: list[Callable[[], _Opened]]) -> tuple[_Opened, dict[str, float]]:
    """Time each of them and keep only the best one loaded. Raises `_StraysTooFar` where none computes right vectors."""
    best: _Opened | None = None
    speeds: dict[str, float] = {}
    strays: _StraysTooFar | None = None
    for open_one in openers:
        try:
            opened = open_one()
        except _StraysTooFar as error:
            strays = error
            continue
        speeds[opened[0].backend] = round(probe_speed(opened[0]), 1)
        slower: _Opened | None = opened
        if best is None or speeds[opened[0].backend] > speeds[best[0].backend]:
            best, slower = opened, best
        if slower is not None:
            slower[0].close()
    if best is None:
        assert strays is not None, "there is at least one candidate"
        raise strays
    return best, speeds


def _opener(model: ResolvedModel, home: Home, candidate: Candidate, threads: int) -> Callable[[], _Opened]:
    def open_one() -> _Opened:
        path = prepare(model, candidate.format, home)
        spec = read_embedding_spec(_folder_of(path))
        return _load(candidate, path, spec, threads), path, spec

    return open_one


def _load(candidate: Candidate, path: Path, spec: EmbeddingSpec, threads: int) -> EmbeddingEngine:
    if candidate.precision == "gguf":
        from cluster.engines.embedding_llamacpp import LlamaCppEmbedding

        return LlamaCppEmbedding(path, threads=threads, max_tokens=spec.max_tokens, pooling=spec.pooling)
    from cluster.engines.embedding_torch import TorchEmbedding

    precision: Literal["bf16", "fp32"] = "bf16" if candidate.precision == "bf16" else "fp32"
    engine = TorchEmbedding(path, threads=threads, pooling=spec.pooling, precision=precision, device=candidate.device)
    if candidate.precision == "int8":
        _turn_to_int8(engine, EmbeddingTokenizer(path, spec))
    return engine


def _turn_to_int8(engine: TorchEmbedding, tokenizer: EmbeddingTokenizer) -> None:
    """Quantize, unless the vectors of real sentences stray from those in float32."""
    token_ids = [text.token_ids for text in tokenizer.encode(_CHECKED_TEXTS)]
    exact = engine.embed(token_ids)
    engine.quantize()
    cosine = float((exact * engine.embed(token_ids)).sum(axis=1).min())
    if not cosine >= _MIN_COSINE:
        engine.close()
        raise _StraysTooFar(f"in int8 its vectors stray from those in float32 (cosine {cosine:.3f})")


def _at_least_one(candidates: list[Candidate], model: ResolvedModel, precision: Precision) -> list[Candidate]:
    if candidates:
        return candidates
    known = " or ".join(model.formats) or "a remote API"
    raise ModelNotFound(
        f"The embedding model {model.source!r} ({known}) cannot run with precision {precision} here. "
        "bf16, int8 and fp32 need a checkpoint folder and torch; gguf needs a .gguf file. Use precision: auto."
    )


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _identify(model: ResolvedModel, path: Path) -> str:
    """Name and the beginning of the weights' sha256."""
    if model.entry is not None:
        return f"{model.entry.upstream}@{model.entry.file.sha256[:8]}"
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")) if path.is_dir() else [path]
    digest = hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
    return f"{model.repository or model.name}@{digest[:8]}"


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _has_gpu() -> bool:
    """Whether this process may use a GPU; a replica hides those that it did not ask for."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Path("/dev/nvidia0").exists() and _has("torch") and visible not in ("", "-1")
