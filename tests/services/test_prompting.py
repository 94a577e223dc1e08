from __future__ import annotations

import pytest

from cluster.engine import SamplingParams
from rag.types import Passage, StoredChunk
from services.chat_types import ChatRequest
from services.errors import ApiError
from services.prompting import Prompt, faithful, fit_prompt
from tests.services.scripted_model import ScriptedModel

SYSTEM = {"role": "system", "content": "Be kind."}


def passage(number: int, num_words: int = 20) -> Passage:
    text = " ".join([f"p{number}"] * num_words)
    chunk = StoredChunk(f"c{number}", "col", "doc", "ver", "d.md", text, 0, len(text), number, headings=("Leave",))
    return Passage(chunk, 1.0 / number)


def history(num_turns: int, words: int = 20) -> list[dict[str, str]]:
    turns = []
    for number in range(num_turns):
        turns.append({"role": "user", "content": " ".join([f"q{number}"] * words)})
        turns.append({"role": "assistant", "content": " ".join([f"a{number}"] * words)})
    return turns


async def fit(
    messages: list[dict[str, str]], passages: list[Passage], *, context: int, max_tokens: int | None = None
) -> Prompt:
    request = ChatRequest("r", "tiny", messages, SamplingParams(max_tokens=max_tokens))
    return await fit_prompt(request, passages, [], model=ScriptedModel(max_context=context), default_max_tokens=64)


def everything(prompt: Prompt) -> str:
    return "\n".join(str(message["content"]) for message in prompt.messages)


QUESTION = {"role": "user", "content": "How long is leave?"}


async def test_what_fits_is_left_alone() -> None:
    prompt = await fit([SYSTEM, *history(2), QUESTION], [passage(1), passage(2)], context=4096)
    assert prompt.trimmed is None
    assert len(prompt.messages) == 6
    assert "Context:\nLeave\np1" in everything(prompt) and "Leave\np2" in everything(prompt)
    assert str(prompt.messages[-1]["content"]).endswith("sentences: How long is leave?")


async def test_without_passages_messages_are_untouched() -> None:
    assert (await fit([SYSTEM, QUESTION], [], context=4096)).messages == [SYSTEM, QUESTION]


async def test_the_oldest_turns_go_first_and_whole() -> None:
    prompt = await fit([SYSTEM, *history(6), QUESTION], [passage(1)], context=240)
    assert prompt.trimmed is not None
    assert prompt.trimmed.num_passages == 0
    assert prompt.trimmed.num_messages % 2 == 0
    assert prompt.messages[0] == SYSTEM
    kept = [str(message["content"]).split()[0] for message in prompt.messages[1:-1]]
    assert kept == [f"{role}{number}" for number in range(6) for role in "qa"][-len(kept) :]
    assert "oldest turns" in prompt.trimmed.reason


async def test_as_little_as_possible_is_left_out() -> None:
    messages = [SYSTEM, *history(6), QUESTION]
    prompt = await fit(messages, [passage(1)], context=240)
    model = ScriptedModel()
    used = sum(len(str(message["content"]).split()) + 1 for message in prompt.messages)
    assert used <= 240 - 60 < used + 42
    assert model.requests == []


async def test_then_the_weakest_passages_go_but_one_stays() -> None:
    prompt = await fit([QUESTION], [passage(n) for n in range(1, 6)], context=120)
    assert [entry.chunk.index for entry in prompt.passages] == [1, 2, 3]
    assert prompt.trimmed is not None
    assert (prompt.trimmed.num_messages, prompt.trimmed.num_passages) == (0, 2)
    assert "p4" not in everything(prompt)


async def test_what_must_stay_and_does_not_fit_is_refused() -> None:
    with pytest.raises(ApiError, match="context has 60") as caught:
        await fit([QUESTION], [passage(1, num_words=100)], context=60)
    assert caught.value.code == "context_length_exceeded"


async def test_an_answer_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ApiError, match="max_tokens is 500") as caught:
        await fit([QUESTION], [], context=500, max_tokens=500)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize(("asked", "given"), [(10, 10), (None, 64)])
async def test_the_length_of_the_answer_is_settled(asked: int | None, given: int) -> None:
    assert (await fit([QUESTION], [], context=4096, max_tokens=asked)).sampling.max_tokens == given


async def test_messages_after_the_question_stay_with_it() -> None:
    messages = [QUESTION, {"role": "assistant", "content": "call"}, {"role": "tool", "content": "result"}]
    prompt = await fit(messages, [passage(1)], context=4096)
    assert [message["role"] for message in prompt.messages] == ["user", "assistant", "tool"]
    assert "Context:" in str(prompt.messages[0]["content"])


async def test_a_model_that_can_cite_is_asked_to() -> None:
    request = ChatRequest("r", "large", [QUESTION])
    prompt = await fit_prompt(
        request, [passage(1), passage(2)], [], model=ScriptedModel(), default_max_tokens=64, ask_to_cite=True
    )
    assert "[1] Leave\np1" in everything(prompt) and "[2] Leave\np2" in everything(prompt)
    assert "cite the source" in everything(prompt)


def test_answers_from_documents_take_the_likeliest_words_unless_the_client_says_otherwise() -> None:
    assert faithful(SamplingParams()) == SamplingParams(temperature=0.0, frequency_penalty=0.5)
    chosen = SamplingParams(temperature=0.7, frequency_penalty=0.0)
    assert faithful(chosen) == chosen
    assert faithful(SamplingParams(json_schema={})) == SamplingParams(json_schema={}, temperature=0.0)


async def test_a_chat_without_passages_keeps_its_sampling() -> None:
    prompt = await fit([QUESTION], [], context=4096)
    assert prompt.sampling.temperature is None
