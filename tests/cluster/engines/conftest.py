"""The three engines, each started once: llama.cpp, vLLM, and a remote API (llama.cpp behind our own rendering)."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from cluster.engine import Engine, GenerationRequest, SamplingParams
from cluster.engines.choice import EngineChoice, make_engine
from cluster.engines.settings import EngineSettings
from cluster.home import open_home
from cluster.weights.prepare import prepare
from services.error_responses import error_body, to_api_error
from services.event_stream import DONE, until_client_leaves
from services.listener import start_listener
from services.model_wire import RenderOptions
from services.openai_api import ChatCompletionRequest, CompletionRequest
from services.openai_stream import make_renderer
from services.validation import parse_body

MAX_CONTEXT = 512
NUM_SLOTS = 2
MAX_QUEUED = 1


def settings(location: Any, **changes: Any) -> EngineSettings:
    values = {"max_context": MAX_CONTEXT, "parallel_requests": NUM_SLOTS, "max_queued_requests": MAX_QUEUED}
    return EngineSettings(model="tiny", location=location, **(values | changes))


def make_local_engine(kind: str, **changes: Any) -> Engine:
    model_format = "gguf" if kind == "llamacpp" else "hf"
    location = prepare("tiny", model_format, open_home())
    return make_engine(EngineChoice(kind, model_format, uses_gpu=False), settings(location, **changes))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def llamacpp() -> AsyncIterator[Engine]:
    engine = make_local_engine("llamacpp")
    await engine.start()
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def vllm() -> AsyncIterator[Engine]:
    engine = make_local_engine("vllm")
    await engine.start()
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def remote(llamacpp: Engine) -> AsyncIterator[Engine]:
    listener = await start_listener(OpenAiApi(llamacpp))
    engine = make_engine(
        EngineChoice("remote", None, uses_gpu=False),
        settings(f"{listener.url}/v1", max_context=None, remote_model="there", remote_key="the-key"),
    )
    await engine.start()
    yield engine
    await engine.stop()
    await listener.stop()


@pytest.fixture(
    params=[
        pytest.param("llamacpp"),
        pytest.param("vllm", marks=pytest.mark.requires("vllm")),
        pytest.param("remote"),
    ]
)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


class OpenAiApi:
    """The smallest OpenAI-shaped API around an engine, made of the product's own validation and rendering."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(self, scope, receive, send) -> None:
        path = scope["path"]
        if dict(scope["headers"]).get(b"authorization") != b"Bearer the-key":
            return await _answer(send, 401, {"error": {"message": "no"}})
        if path == "/v1/models":
            model = {"id": "there", "max_model_len": self._engine.info.max_context}
            return await _answer(send, 200, {"data": [model]})
        kind = ChatCompletionRequest if path == "/v1/chat/completions" else CompletionRequest
        try:
            body = parse_body(kind, await _read(receive))
            await until_client_leaves(receive, self._stream(body, send))
        except Exception as error:  # noqa: BLE001  # as the product does
            api = to_api_error(error)
            await _answer(send, api.status, error_body(api))

    async def _stream(self, body: ChatCompletionRequest | CompletionRequest, send) -> None:
        is_chat = isinstance(body, ChatCompletionRequest)
        prompt = {"messages": body.engine_messages()} if is_chat else body.prompt_field()
        request = GenerationRequest("r", sampling=body.sampling(), **prompt)
        renderer = make_renderer(
            RenderOptions("chat" if is_chat else "completion", "id", "there", 1, body.includes_usage, first_role=True)
        )
        has_begun = False
        async for chunk in self._engine.generate(request):
            if not has_begun:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                has_begun = True
                await send({"type": "http.response.body", "body": renderer.begin(), "more_body": True})
            await send({"type": "http.response.body", "body": renderer.chunk(chunk), "more_body": True})
        await send({"type": "http.response.body", "body": DONE})


async def _read(receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _answer(send, status: int, value: Any) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


def chat(question: str, **sampling: Any) -> GenerationRequest:
    messages = [{"role": "user", "content": question}]
    return GenerationRequest("r", messages=messages, sampling=SamplingParams(**({"max_tokens": 12} | sampling)))


def text_prompt(prompt: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest("r", prompt_text=prompt, sampling=SamplingParams(**({"max_tokens": 12} | sampling)))
