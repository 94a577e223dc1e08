"""How many bytes a model needs: weights, KV cache and activations, in all and per rank. Pure arithmetic.

Grouped-query attention counts key-value heads, sliding-window attention bounds the cached tokens of a sequence, and a
sparse mixture counts all experts for memory but only those of a token for work. Figures for activations are an upper
estimate of one forward pass, as an engine profiles it at its start.

Sums are those of the engines: what vLLM reserves for a sequence, in the type that it computes in, and on CPU nodes also
the float32 copies of linear layers. Whether a CPU needs those copies is not known of machines that are only described,
and a gang may run on any of its nodes, so they are always counted there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import ModelDamaged

# Tokens that one step of an engine computes at most, where nobody says otherwise.
STEP_TOKENS = 2048
# vLLM frees what a window has left behind only when a step is done, while the next one is computed already.
_STEPS_IN_FLIGHT = 2
# vLLM's blocks on GPUs and on CPUs. A sequence's blocks are whole, and one more holds the beginning of a window.
_GPU_BLOCK_TOKENS, _CPU_BLOCK_TOKENS = 16, 128

# Bytes that one parameter takes, by the name that checkpoints use.
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a decoder-only transformer of the Llama, Mistral or Mixtral kind.

    `num_experts` is 1 for a dense model. `sliding_window` is in tokens, `None` where every token sees all before it.
    `bytes_per_param` is that of the weights, `bytes_per_value` of what is computed and cached.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    num_experts: int = 1
    experts_per_token: int = 1
    sliding_window: int | None = None
    tied_embeddings: bool = False
    bytes_per_param: float = 2.0
    bytes_per_value: int = 2

    @property
    def is_sparse(self) -> bool:
        return self.num_experts > 1

    @property
    def attention_params(self) -> int:
        """Parameters of one layer's attention: queries, keys, values, output."""
        queries_and_output = 2 * self.hidden_size * self.num_heads * self.head_dim
        keys_and_values = 2 * self.hidden_size * self.num_kv_heads * self.head_dim
        return queries_and_output + keys_and_values

    @property
    def expert_params(self) -> int:
        """Parameters of one expert of one layer (gate, up and down projection); for a dense model its whole block."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def router_params(self) -> int:
        return self.hidden_size * self.num_experts if self.is_sparse else 0

    @property
    def embedding_params(self) -> int:
        """Token embedding and output head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def norm_params(self) -> int:
        return self.hidden_size * (2 * self.num_layers + 1)

    @property
    def total_params(self) -> int:
        per_layer = self.attention_params + self.router_params + self.num_experts * self.expert_params
        return self.num_layers * per_layer + self.embedding_params + self.norm_params

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through (the embedding table counted as the published figures do)."""
        per_layer = self.attention_params + self.router_params + self.experts_per_token * self.expert_params
        return self.num_layers * per_layer + self.embedding_params + self.norm_params

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached token takes over all layers and key-value heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_value

    def in_dtype(self, dtype: object) -> ModelShape:
        """With the weights and values that an engine has for its option `dtype`; it computes in half precision unless
        float32 is asked for. Quantized weights stay as they are."""
        if dtype not in ("float32", "float"):
            return self
        weights = 4.0 if self.bytes_per_param == 2 else self.bytes_per_param
        return replace(self, bytes_per_param=weights, bytes_per_value=4)


def cached_tokens(num_sequences: int, context: int, window: int | None, step_tokens: int, *, is_on_cpu: bool) -> int:
    """Tokens that an engine reserves for so many sequences of `context` tokens: with a sliding window those that each
    sees, and once those of the steps under way, whichever sequences they are of."""
    seen = context if window is None else min(context, window)
    under_way = min(num_sequences * (context - seen), _STEPS_IN_FLIGHT * step_tokens)
    rounding = 2 * (_CPU_BLOCK_TOKENS if is_on_cpu else _GPU_BLOCK_TOKENS)
    return num_sequences * (seen + rounding) + under_way


def window_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that each layer of a checkpoint with this config.json sees; none where a layer sees all before it, or
    where it is not known that all layers have the window."""
    has_windows_only = set(config.get("layer_types") or ["sliding_attention"]) == {"sliding_attention"}
    is_known = config.get("model_type", "mistral") in ("mistral", "mixtral")
    return (config.get("sliding_window") or None) if has_windows_only and is_known else None


@dataclass(frozen=True, slots=True)
class Workload:
    """What one replica has to hold at once. `context` and `batch_tokens` are in tokens."""

    context: int
    num_sequences: int = 1
    batch_tokens: int = STEP_TOKENS


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Sizes of one replica. Experts lie on `tensor * data` ranks where `is_expert_parallel`, else each rank holds a
    slice of every expert."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    is_expert_parallel: bool = False

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def num_expert_ranks(self) -> int:
        return self.tensor * self.data if self.is_expert_parallel else 1


@dataclass(frozen=True, slots=True)
class RankBytes:
    """Bytes of one rank. `runtime` is what its processes hold beside the model, where they share its memory."""

    weights: int
    kv_cache: int
    activations: int
    runtime: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.runtime


def rank_bytes(
    shape: ModelShape,
    parallel: Parallelism,
    work: Workload,
    *,
    num_experts_here: int | None = None,
    is_on_cpu: bool = False,
) -> RankBytes:
    """Bytes that the largest rank of a replica needs.

    `num_experts_here` is the number of experts that the rank holds in each layer (with copies of redundant experts);
    by default an equal share. Key-value heads that are fewer than the tensor-parallel size are copied to the ranks.
    The sequences of a replica are spread over its data-parallel ranks.
    """
    layers = -(-shape.num_layers // parallel.pipeline)
    if num_experts_here is None:
        num_experts_here = -(-shape.num_experts // parallel.num_expert_ranks)
    experts = num_experts_here * shape.expert_params
    if not parallel.is_expert_parallel:
        experts = -(-experts // parallel.tensor)
    per_layer = _attention_params_of_rank(shape, parallel.tensor) + shape.router_params + experts
    # The largest rank is the first or last stage of the pipeline: it holds the embedding or the output head.
    ends = shape.embedding_params if parallel.pipeline == 1 else shape.vocab_size * shape.hidden_size
    params = layers * per_layer + -(-ends // parallel.tensor) + shape.norm_params
    copies = _float32_copies(shape, parallel, layers) if is_on_cpu else 0
    return RankBytes(
        weights=int(params * shape.bytes_per_param) + copies,
        kv_cache=_kv_bytes_of_rank(shape, parallel, work, layers, is_on_cpu=is_on_cpu),
        activations=_activation_bytes(shape, parallel, work),
    )


def _float32_copies(shape: ModelShape, parallel: Parallelism, layers: int) -> int:
    """What a rank holds more on a CPU without arithmetic of half precision: float32 in place of half precision in
    linear layers but not in experts, and beside it for embedding and output head, for each even where they are tied."""
    if shape.bytes_per_param != 2:
        return 0
    linear = _attention_params_of_rank(shape, parallel.tensor) + shape.router_params
    if not shape.is_sparse:
        linear += -(-shape.expert_params // parallel.tensor)
    ends = shape.vocab_size * shape.hidden_size * (2 if parallel.pipeline == 1 else 1)
    return 2 * layers * linear + 4 * -(-ends // parallel.tensor)


def _attention_params_of_rank(shape: ModelShape, tensor: int) -> int:
    kv_heads = max(1, shape.num_kv_heads // tensor)
    heads = shape.num_heads // tensor
    return 2 * shape.hidden_size * shape.head_dim * (heads + kv_heads)


def _kv_bytes_of_rank(shape: ModelShape, parallel: Parallelism, work: Workload, layers: int, *, is_on_cpu: bool) -> int:
    kv_heads = max(1, shape.num_kv_heads // parallel.tensor)
    sequences = -(-work.num_sequences // parallel.data)
    per_token = 2 * layers * kv_heads * shape.head_dim * shape.bytes_per_value
    tokens = cached_tokens(sequences, work.context, shape.sliding_window, work.batch_tokens, is_on_cpu=is_on_cpu)
    return tokens * per_token


def _activation_bytes(shape: ModelShape, parallel: Parallelism, work: Workload) -> int:
    """Residual stream and its copy, queries/keys/values, the two wide products of the routed experts, and logits."""
    wide = (
        2 * shape.intermediate_size * shape.experts_per_token // (1 if parallel.is_expert_parallel else parallel.tensor)
    )
    attention = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // parallel.tensor
    values = work.batch_tokens * (2 * shape.hidden_size + attention + wide)
    logits = work.num_sequences * shape.vocab_size // parallel.tensor
    return shape.bytes_per_value * values + 4 * logits


_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def shape_from_config(config: Mapping[str, Any], *, name: str, bytes_per_param: float | None = None) -> ModelShape:
    """Shape from the `config.json` of a checkpoint, as engines load it: float32 becomes half precision there.
    `bytes_per_param` for weights that are quantized."""
    missing = [key for key in _NEEDED if not isinstance(config.get(key), int)]
    if missing:
        raise ModelDamaged(f"The config of {name} lacks {', '.join(missing)}; is it a Llama, Mistral or Mixtral model?")
    heads = int(config["num_attention_heads"])
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if bytes_per_param is None:
        if dtype not in DTYPE_BYTES:
            raise ModelDamaged(f"The config of {name} names the type {dtype!r}; known: {', '.join(DTYPE_BYTES)}.")
        bytes_per_param = min(2, DTYPE_BYTES[dtype])
    return ModelShape(
        name=name,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        vocab_size=int(config["vocab_size"]),
        max_context=int(config.get("max_position_embeddings") or 4096),
        num_experts=int(config.get("num_local_experts") or 1),
        experts_per_token=int(config.get("num_experts_per_tok") or 1),
        sliding_window=window_of(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        bytes_per_param=bytes_per_param,
    )
