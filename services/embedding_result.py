"""What the embedding deployment answers. Apart from it, so that callers load none of its libraries."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

TextKind = Literal["query", "passage", "raw"]
"""Which of the model's prefixes a text gets; `raw`: none."""


@dataclass(frozen=True, slots=True)
class EmbeddingResult:
    """Vectors in the order of the texts, L2-normalised, shape (num_texts, dimension).

    `num_tokens` counts what the model read, prefix and special tokens included; `truncated` says which texts were
    longer than it can read. `model` names the weights.
    """

    vectors: npt.NDArray[np.float32]
    num_tokens: list[int]
    truncated: list[bool]
    model: str
