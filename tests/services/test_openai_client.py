"""OpenAI's own client, unchanged, against the endpoint with the bundled model on llama.cpp: real tokens, real refusals,
a real process that is killed in the middle of a stream."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from cluster.catalogue import resolve
from cluster.engines.choice import choose_engine, detect_hardware, make_engine
from cluster.engines.settings import EngineSettings
from cluster.home import open_home
from cluster.weights.prepare import prepare
from services.config import PlatformConfig, StreamsConfig
from services.discovery import ReplicaEndpoint, encode_beat
from services.model_status import ApplicationState
from tests.services.harness import SECRET, Running, running_endpoint

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
ROOT = Path(__file__).parents[2]


def make_tiny() -> Any:
    resolved = resolve("tiny")
    choice = choose_engine(resolved, detect_hardware(), "llamacpp")
    assert choice.model_format is not None
    location = prepare(resolved, choice.model_format, open_home())
    return make_engine(choice, EngineSettings(model="tiny", location=location, max_context=512, parallel_requests=2))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running_endpoint(tmp_path_factory.mktemp("home"), make_tiny()) as endpoint:
        yield endpoint


async def test_the_model_answers_and_streams_the_same_words(running: Running) -> None:
    arguments: Any = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = await running.openai.chat.completions.create(**arguments)
    stream = await running.openai.chat.completions.create(**arguments, stream=True)
    streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "Paris" in (whole.choices[0].message.content or "")
    assert streamed == whole.choices[0].message.content
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 24


async def test_stop_seed_and_logprobs_work(running: Running) -> None:
    arguments: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 16, "seed": 3, "temperature": 0.9}
    first = await running.openai.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    second = await running.openai.chat.completions.create(**arguments)
    assert first.choices[0].message.content == second.choices[0].message.content
    logprobs = first.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in logprobs.content)
    stopped = await running.openai.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, stop=["Paris"], max_tokens=32
    )
    assert "Paris" not in (stopped.choices[0].message.content or "")
    assert stopped.choices[0].finish_reason == "stop"


async def test_a_json_schema_binds_the_answer(running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
        "required": ["capital", "sure"],
        "additionalProperties": False,
    }
    answer = await running.openai.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"capital", "sure"}
    assert value["capital"] in ("Paris", "Rome")


async def test_text_is_continued(running: Running) -> None:
    answer = await running.openai.completions.create(
        model="tiny", prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=1
    )
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text


async def test_what_does_not_fit_is_refused_with_both_numbers(running: Running) -> None:
    create = running.openai.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        await create(model="tiny", messages=QUESTION, max_tokens=9000)
    assert refused.value.code == "context_length_exceeded"
    assert "9000" in refused.value.message and "512" in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        await create(model="tiny", messages=[{"role": "user", "content": "word " * 2000}])
    assert refused.value.code == "context_length_exceeded"


async def test_without_a_limit_the_answer_takes_what_the_context_leaves(running: Running) -> None:
    """The configured default of 512 tokens is as long as the whole context here."""
    answer = await running.openai.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, stop=["."])
    assert "Paris" in (answer.choices[0].message.content or "")


async def test_a_client_that_closes_its_stream_frees_the_slot(running: Running) -> None:
    arguments: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 400}
    endless: Any = {"logit_bias": {"2": -100}}
    for _ in range(4):  # twice as many as there are slots
        stream = await running.openai.chat.completions.create(**arguments, **endless, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
    answer = await asyncio.wait_for(running.openai.chat.completions.create(**arguments | {"max_tokens": 2}), 20)
    assert answer.usage is not None


_REPLICA = """
import asyncio, sys
from tests.services.harness import Beats
from tests.services.test_openai_client import make_tiny
from services.model_service import ModelService

async def main():
    service = ModelService(
        make_tiny(), sys.argv[1], app="llm-tiny", replica_id="other", beats=Beats()
    )
    await service.start()
    print(service.url, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_model_server_is_an_error_in_the_stream_and_the_next_request_is_told(
    tmp_path: Path,
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _REPLICA, SECRET, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    config = PlatformConfig(streams=StreamsConfig(move_wait_s=0.5))
    states = {"llm-tiny": ApplicationState("llm-tiny", "UNHEALTHY", "Its replica is being replaced.")}
    async with running_endpoint(tmp_path, config=config, states=states) as running:
        beat = ReplicaEndpoint("other", "llm-tiny", url, process.pid, model="tiny", info={"max_context": 512})
        running.beats.put(beat.key, encode_beat(beat))
        await running.directory.refresh()
        create = running.openai.chat.completions.create
        stream = await create(model="tiny", messages=QUESTION, max_tokens=400, logit_bias={"2": -100}, stream=True)
        num_chunks = 0
        with pytest.raises(openai.APIError, match="was lost in the middle"):
            async for _ in stream:
                num_chunks += 1
                if num_chunks == 4:
                    process.send_signal(signal.SIGKILL)
                    await process.wait()
        with pytest.raises(openai.InternalServerError, match="Its replica is being replaced"):
            await create(model="tiny", messages=QUESTION, max_tokens=2)
