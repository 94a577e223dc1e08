"""The public endpoint over a real socket, asked by the official client, unchanged."""

from pathlib import Path

import openai
import pytest

from cluster.engine import GenerationChunk
from cluster.errors import EngineBusy, EngineFailed
from services.model_status import ApplicationState
from tests.services.harness import (
    HELLO,
    ScriptedEngine,
    running_endpoint,
    words,
)


async def test_openais_client_chats(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("Hel", "lo"))) as running:
        answer = await running.openai.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert answer.id.startswith("chatcmpl-")


async def test_openais_client_streams_with_usage(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("Hel", "lo"))) as running:
        stream = await running.openai.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


async def test_openais_client_completes_text(tmp_path: Path) -> None:
    engine = ScriptedEngine(*words(" upon", " a time"))
    async with running_endpoint(tmp_path, engine) as running:
        whole = await running.openai.completions.create(model="tiny", prompt="Once")
        stream = await running.openai.completions.create(model="tiny", prompt=[1, 2], stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert whole.choices[0].text == text == " upon a time"
    assert [request.prompt_text for request in engine.requests] == ["Once", None]
    assert list(engine.requests[1].prompt_token_ids) == [1, 2]
    assert engine.requests[0].sampling.max_tokens == 16


async def test_openais_client_gets_vectors_and_models(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("x"))) as running:
        vectors = await running.openai.embeddings.create(model="embed", input=["a", "bb"])
        ids = await running.openai.embeddings.create(model="embed", input=[[7, 8, 9]], extra_body={"input_type": "raw"})
        models = [model.id async for model in running.openai.models.list()]
        tiny = await running.openai.models.retrieve("tiny")
    assert [entry.embedding for entry in vectors.data] == [[1, 1, 0, 0], [2, 1, 0, 0]]
    assert vectors.usage.total_tokens == 3
    assert [entry.embedding for entry in ids.data] == [[3, 1, 0, 0]]
    assert models == ["tiny", "embed"]
    assert (tiny.id, tiny.model_extra["max_context"], tiny.model_extra["ready"]) == ("tiny", 64, True)


async def test_the_default_model_is_listed_first(tmp_path: Path) -> None:
    states = {name: ApplicationState(name, "RUNNING") for name in ("llm-tiny", "llm-a-small-one", "llm-zebra")}
    async with running_endpoint(tmp_path, states=states) as running:
        assert [model.id async for model in running.openai.models.list()] == ["tiny", "a-small-one", "zebra", "embed"]


async def test_openais_client_is_told_which_inputs_were_cut(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        vectors = await running.openai.embeddings.create(model="embed", input=["short", "long " * 50, "short"])
        whole = await running.openai.embeddings.create(model="embed", input="short")
    assert vectors.model_extra == {"windfarm": {"truncated": [1]}}
    assert not whole.model_extra


async def test_openais_client_raises_its_own_errors(tmp_path: Path) -> None:
    engine = ScriptedEngine(EngineBusy("All slots are taken."))
    async with running_endpoint(tmp_path, engine) as running:
        create = running.openai.chat.completions.create
        with pytest.raises(openai.NotFoundError, match=r"There is no model 'huge'\. There are: tiny\."):
            await create(model="huge", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await create(model="tiny", messages=HELLO, temperature=9)
        with pytest.raises(openai.InternalServerError, match="All slots are taken"):
            await create(model="tiny", messages=HELLO)
        with pytest.raises(openai.AuthenticationError, match="api key is wrong"):
            await running.openai.with_options(api_key="wf-wrong").models.list()


async def test_openais_client_raises_when_a_stream_breaks(tmp_path: Path) -> None:
    engine = ScriptedEngine(GenerationChunk((1,), "Hel"), EngineFailed("The engine stumbled."))
    async with running_endpoint(tmp_path, engine) as running:
        stream = await running.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="The engine stumbled"):
            async for _ in stream:
                pass
