"""The three engines, each started once: llama.cpp, vLLM, and a remote API, which is the running product itself."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from cluster.engine import Engine, GenerationRequest, SamplingParams
from cluster.engines.choice import EngineChoice, make_engine
from cluster.engines.settings import EngineSettings
from cluster.home import open_home
from cluster.weights.prepare import prepare
from tests.product import Product

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
async def remote(product: Product) -> AsyncIterator[Engine]:
    engine = make_engine(
        EngineChoice("remote", None, uses_gpu=False),
        settings(product.api, max_context=None, remote_model="tiny", remote_key=product.key),
    )
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture(
    params=[
        pytest.param("llamacpp"),
        pytest.param("vllm", marks=pytest.mark.requires("vllm")),
        pytest.param("remote", marks=pytest.mark.e2e),
    ]
)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


def chat(question: str, **sampling: Any) -> GenerationRequest:
    messages = [{"role": "user", "content": question}]
    return GenerationRequest("r", messages=messages, sampling=SamplingParams(**({"max_tokens": 12} | sampling)))


def text_prompt(prompt: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest("r", prompt_text=prompt, sampling=SamplingParams(**({"max_tokens": 12} | sampling)))
