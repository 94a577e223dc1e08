"""vLLM going on with an answer that another engine began: its text, its stop strings, and what the plugin is told.

vLLM gets prompt and delivered tokens as one prompt. By itself it would spell what follows without knowing how the
answer began, and look for stop strings in the rest alone; so both are done here, with vLLM's own detokenizer.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from cluster import vllm_plugin
from cluster.engine import Delivered, SamplingParams
from cluster.engines.resumption import catch_up
from cluster.engines.stop_strings import StopMatcher
from cluster.vllm_plugin.options import continued_arguments
from cluster.vllm_plugin.versions import is_known_version


def continues_guided_answers() -> bool:
    """Whether the plugin's part that advances grammars runs in the engine's process: where vLLM loads plugins at all,
    and knows this version."""
    return vllm_plugin.is_loaded and is_known_version()


class ContinuedText:
    """Text of one continued answer. `caught_up`: what is due of the delivered tokens, and whether they are all."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        delivered: Delivered,
        max_tokens: int,
        end_ids: Container[int],
    ) -> None:
        from vllm.sampling_params import SamplingParams as VllmSamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        request = EngineCoreRequest(
            request_id="continued",
            prompt_token_ids=list(prompt_ids),
            mm_features=None,
            sampling_params=VllmSamplingParams(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self._stops = StopMatcher(sampling.stop)
        pieces = map(self._spell, delivered.token_ids)
        self.caught_up = catch_up(pieces, self._stops, delivered, max_tokens, end_ids)

    @property
    def has_stopped(self) -> bool:
        return self._stops.matched is not None

    def feed(self, token_ids: Sequence[int], *, ends_with_stop_token: bool) -> tuple[str, int]:
        """What can be shown after these tokens, and how many of them are of the answer.

        vLLM knows nothing of the stop strings here, so tokens behind one come along where several come at once.
        """
        spelled = token_ids[:-1] if ends_with_stop_token else token_ids
        shown = ""
        for number, token_id in enumerate(spelled, 1):
            shown += self._stops.feed(self._spell(token_id))
            if self.has_stopped:
                return shown, number
        return shown, len(token_ids)

    def finish(self) -> str:
        """The answer ended: what was held back as the beginning of a stop string is text."""
        return self._stops.finish()

    def _spell(self, token_id: int) -> str:
        self._detokenizer.update([token_id], False)
        return str(self._detokenizer.get_next_output_text(False, True))


def continued_options(delivered: Delivered) -> dict[str, Any]:
    """Fields of vLLM's sampling parameters that differ: we look for stop strings, and the plugin hears what is of the
    answer."""
    return {"stop": [], "extra_args": continued_arguments(len(delivered.token_ids))}
