"""Cross-encoders with PyTorch: a checkpoint folder that scores a question and a text together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import EngineDead, EngineFailed, ModelDamaged, ModelNotFound

_BATCH = 16
_MOST_TOKENS = 512


class CrossEncoder:
    """One checkpoint of a sequence classifier with one output. Needs PyTorch and Transformers; reads nothing but the
    folder."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"{folder} holds no checkpoint (config.json is missing). Name the folder of a cross-encoder."
            )
        try:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise ModelNotFound(
                "A cross-encoder needs PyTorch, which this environment lacks. Set up the full profile, or name the URL "
                "of a reranking service."
            ) from error
        self._torch = torch
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelDamaged(f"PyTorch cannot load {folder} as a cross-encoder: {error}") from error
        if model.config.num_labels != 1:
            raise ModelDamaged(
                f"{folder} has {model.config.num_labels} outputs; a cross-encoder for reranking has one score."
            )
        self._model: Any = model.eval()
        limit = getattr(model.config, "max_position_embeddings", _MOST_TOKENS)
        self._max_tokens = min(_MOST_TOKENS, int(limit), int(self._tokenizer.model_max_length))

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """One score a text, higher is better. Texts are cut at the model's limit. Blocks."""
        if self._model is None:
            raise EngineDead("The cross-encoder was closed.")
        found: list[float] = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            inputs = self._tokenizer(
                [query] * len(batch),
                batch,
                padding=True,
                truncation="longest_first",
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            try:
                with self._torch.inference_mode():
                    found += self._model(**inputs).logits[:, 0].float().tolist()
            except RuntimeError as error:
                raise EngineFailed(f"The cross-encoder could not score: {error}") from error
        return found

    def close(self) -> None:
        """Free the model."""
        self._model = None
