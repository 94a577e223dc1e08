"""Builds the prompt of a chat and makes it fit into the model's context.

What gives way, in this order: the oldest turns of the history, one whole turn at a time; then passages, the weakest
first, down to one. The system message and the current turn (from the user's last message on) always stay; where these
alone are too long, the request is refused. Sizes are counted by the model's own tokenizer over its own template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.engine import GenerationRequest, SamplingParams
from rag.types import Passage
from services.chat_types import ChatRequest, ContextTrimmed, Message, ModelClient
from services.errors import ApiError, invalid
from services.tools.prompting import text_of, with_tools

_FROM_CONTEXT = "Use only the context above to answer this question in one or two sentences:"
_FROM_SOURCES = (
    "Answer the question from these sources only, and cite the source of each statement as [1]. "
    "If they do not tell, say so.\n\nQuestion:"
)
_LOOP_PENALTY = 0.5
_SHARE_FOR_ANSWER = 4
"""Where the client names no length, up to a quarter of the context is kept free for the answer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages that fit, what of the passages they hold, and the sampling with the answer's length settled."""

    messages: list[Message]
    passages: list[Passage]
    sampling: SamplingParams
    trimmed: ContextTrimmed | None


async def fit_prompt(
    request: ChatRequest,
    passages: Sequence[Passage],
    tool_schemas: Sequence[Mapping[str, Any]],
    *,
    model: ModelClient,
    default_max_tokens: int,
    ask_to_cite: bool = False,
) -> Prompt:
    """The longest prompt that leaves room for the answer. Raises `ApiError` where even the shortest does not."""
    parts = _Parts.of(request.messages, ask_to_cite)
    room = _answer_room(request.sampling, model.max_context, default_max_tokens)
    # Results of tools come into the same context later.
    budget = model.max_context - room - (model.max_context // 4 if tool_schemas else 0)

    async def size(num_dropped: int) -> int:
        messages, _ = parts.without(num_dropped, passages)
        return await model.count_tokens(_counted(request, messages, tool_schemas, model))

    most = parts.max_dropped(passages)
    num_dropped, num_tokens = 0, await size(0)
    if num_tokens > budget:
        num_dropped, num_tokens = await _fewest(size, budget, most)
    if num_tokens > budget:
        raise _too_long(num_tokens, room, model.max_context)
    messages, kept = parts.without(num_dropped, passages)
    max_tokens = request.sampling.max_tokens or min(default_max_tokens, model.max_context - num_tokens)
    sampling = dataclasses.replace(request.sampling, max_tokens=max_tokens)
    return Prompt(
        messages,
        kept,
        faithful(sampling) if kept else sampling,
        _trimmed(parts, num_dropped, len(passages) - len(kept), model.max_context),
    )


def faithful(sampling: SamplingParams) -> SamplingParams:
    """What documents say is to be repeated, not varied: where the client leaves it open, the likeliest words are taken.

    The penalty keeps small models that take the likeliest words out of loops; bound output (JSON) repeats by nature.
    """
    if sampling.temperature is None:
        sampling = dataclasses.replace(sampling, temperature=0.0)
    is_bound = sampling.json_schema is not None or sampling.grammar is not None
    if sampling.frequency_penalty is None and sampling.presence_penalty is None and not is_bound:
        sampling = dataclasses.replace(sampling, frequency_penalty=_LOOP_PENALTY)
    return sampling


def last_user_text(messages: Sequence[Message]) -> str:
    """The question: the text of the last message that a user wrote."""
    return next((text_of(message) for message in reversed(messages) if message.get("role") == "user"), "")


def with_passages(messages: Sequence[Message], passages: Sequence[Passage], *, ask_to_cite: bool) -> list[Message]:
    """The passages before the question, in the user's own message: small models read that best, and they answer
    better when nothing is numbered."""
    if not passages:
        return list(messages)
    place = max(index for index, message in enumerate(messages) if message.get("role") == "user")
    texts = [_passage_text(passage) for passage in passages]
    question = text_of(messages[place])
    if ask_to_cite:
        sources = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1))
        content = f"Sources:\n{sources}\n\n{_FROM_SOURCES} {question}"
    else:
        content = "Context:\n" + "\n\n".join(texts) + f"\n\n{_FROM_CONTEXT} {question}"
    return [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]]


def _passage_text(passage: Passage) -> str:
    """Headings say what a passage is about when it was cut out of a longer text, the header of a table what its rows
    mean."""
    chunk = passage.chunk
    heading = " > ".join(chunk.headings[-2:])
    above = [heading] if heading and heading not in chunk.text else []
    return "\n".join((*above, *([chunk.table_header] if chunk.table_header else ()), chunk.text))


@dataclass(frozen=True, slots=True)
class _Parts:
    """A conversation cut into what may be left out and what may not."""

    system: list[Message]
    turns: list[list[Message]]
    """Earlier turns, each from a user's message to the next one."""
    current: list[Message]
    ask_to_cite: bool

    @classmethod
    def of(cls, messages: Sequence[Message], ask_to_cite: bool) -> _Parts:
        system = [message for message in messages if message.get("role") in ("system", "developer")]
        rest = [message for message in messages if message.get("role") not in ("system", "developer")]
        turns: list[list[Message]] = []
        for message in rest:
            if message.get("role") == "user" or not turns:
                turns.append([])
            turns[-1].append(message)
        return cls(system, turns[:-1], turns[-1] if turns else [], ask_to_cite)

    def max_dropped(self, passages: Sequence[Passage]) -> int:
        return len(self.turns) + max(0, len(passages) - 1)

    def without(self, num_dropped: int, passages: Sequence[Passage]) -> tuple[list[Message], list[Passage]]:
        """The messages with the first `num_dropped` things left out."""
        num_turns = min(num_dropped, len(self.turns))
        kept = list(passages[: len(passages) - (num_dropped - num_turns)])
        history = [message for turn in self.turns[num_turns:] for message in turn]
        current = with_passages(self.current, kept, ask_to_cite=self.ask_to_cite)
        return [*self.system, *history, *current], kept

    def num_messages(self, num_turns: int) -> int:
        return sum(len(turn) for turn in self.turns[:num_turns])


async def _fewest(size: Any, budget: int, most: int) -> tuple[int, int]:
    """The smallest number of things to drop with which the prompt fits (or all), and the prompt's size then."""
    low, high = 1, most
    if most == 0:
        return 0, await size(0)
    while low < high:
        middle = (low + high) // 2
        if await size(middle) <= budget:
            high = middle
        else:
            low = middle + 1
    return low, await size(low)


def _answer_room(sampling: SamplingParams, max_context: int, default_max_tokens: int) -> int:
    if sampling.max_tokens is None:
        return min(default_max_tokens, max_context // _SHARE_FOR_ANSWER)
    if sampling.max_tokens >= max_context:
        raise invalid(
            f"max_tokens is {sampling.max_tokens}, but the model's whole context has {max_context}. Ask for less.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return sampling.max_tokens


def _counted(
    request: ChatRequest, messages: Sequence[Message], schemas: Sequence[Mapping[str, Any]], model: ModelClient
) -> GenerationRequest:
    knows_tools = model.template_knows_tools
    return GenerationRequest(
        request_id=request.request_id,
        messages=with_tools(messages, schemas, template_knows_tools=knows_tools),
        tools=list(schemas) if schemas and knows_tools else None,
        sampling=request.sampling,
    )


def _too_long(num_tokens: int, room: int, max_context: int) -> ApiError:
    return invalid(
        f"The system message and the question take {num_tokens} tokens and the answer {room}; the model's context has "
        f"{max_context}. Shorten the question, or ask for a shorter answer with max_tokens.",
        param="messages",
        code="context_length_exceeded",
    )


def _trimmed(parts: _Parts, num_dropped: int, num_passages: int, max_context: int) -> ContextTrimmed | None:
    if num_dropped == 0:
        return None
    num_messages = parts.num_messages(min(num_dropped, len(parts.turns)))
    reason = (
        f"The model's context has {max_context} tokens: the oldest turns are left out first, then the weakest passages."
    )
    return ContextTrimmed(num_messages, num_passages, reason)
