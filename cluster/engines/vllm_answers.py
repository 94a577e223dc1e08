"""Between the contract of engines and vLLM: sampling parameters in; tokens, log-probabilities and the end out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from cluster.engine import FinishReason, GenerationChunk, SamplingParams, TokenLogprob
from cluster.engines.structured_output import compact_schema, json_schema_grammar
from cluster.errors import EngineFailed, InvalidRequest


def chunk_of(completion: Any, num_tokens: int, text: str, num_alternatives: int | None) -> GenerationChunk:
    """The piece of an answer that the first tokens of vLLM's output are, with the text that is to be shown for it."""
    token_ids = tuple(completion.token_ids)[:num_tokens]
    logprobs = None
    if num_alternatives is not None and completion.logprobs is not None:
        pairs = zip(token_ids, completion.logprobs, strict=False)
        logprobs = tuple(_logprob(token_id, entry, num_alternatives) for token_id, entry in pairs)
    return GenerationChunk(token_ids, text, logprobs)


def _logprob(token_id: int, entry: Mapping[int, Any], num_alternatives: int) -> TokenLogprob:
    """vLLM gives the chosen token and the best ones in one dictionary."""
    best = sorted(entry.values(), key=lambda alternative: -alternative.logprob)[:num_alternatives]
    chosen = entry[token_id]
    top = tuple((alternative.decoded_token or "", alternative.logprob) for alternative in best)
    return TokenLogprob(token_id, chosen.decoded_token or "", chosen.logprob, top)


def finish_reason_of(reason: str) -> FinishReason:
    """Raises `EngineFailed` where vLLM ended the answer by itself."""
    if reason not in ("stop", "length"):
        raise EngineFailed(f"vLLM ended the answer: {reason}.")
    return cast(FinishReason, reason)


def end_ids_of(engine: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of the checkpoint's generation_config.json."""
    told = engine.model_config.try_get_generation_config().get("eos_token_id")
    ids = told if isinstance(told, list) else [told]
    return frozenset(token_id for token_id in [*ids, engine.get_tokenizer().eos_token_id] if token_id is not None)


def sampling_params(sampling: SamplingParams, defaults: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
    """vLLM's parameters. `others` are further ones of vLLM itself, which win."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

    values = dict(defaults)
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "logprobs")
    values |= {name: value for name in names if (value := getattr(sampling, name)) is not None}
    values["top_p"] = max(values.get("top_p", 1.0), 1e-6)  # vLLM refuses 0
    if sampling.json_schema is not None:
        json_schema_grammar(sampling.json_schema)  # the same errors as with the other engines
        values["structured_outputs"] = StructuredOutputsParams(json=compact_schema(sampling.json_schema))
    if sampling.grammar is not None:
        values["structured_outputs"] = StructuredOutputsParams(grammar=sampling.grammar)
    values |= {
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "logit_bias": dict(sampling.logit_bias) if sampling.logit_bias else None,
        "ignore_eos": sampling.ignore_eos,
        "output_kind": RequestOutputKind.DELTA,
        **others,
    }
    try:
        return VllmSamplingParams(**values)
    except ValueError as error:
        raise InvalidRequest(f"vLLM refuses the request: {error}") from error
