"""A replica speaks frames to whoever knows the secret, cancels for clients that go, and drains when it stops."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from cluster.engine import EngineLoad, GenerationChunk, GenerationRequest, ModelInfo, TokenLogprob, Usage
from cluster.errors import EngineBusy, EngineDead, EngineFailed, InvalidRequest
from cluster.expert_load import ExpertLoad
from services import model_service
from services.discovery import decode_beat
from services.frames import FrameDecoder, FrameKind
from services.model_service import ModelService

SECRET = "s3cret"
RENDER = {"kind": "chat", "id": "chatcmpl-1", "model": "tiny", "created": 5, "include_usage": True, "first_role": True}
PROMPT = {"request_id": "r1", "messages": [{"role": "user", "content": "hi"}]}


class ScriptedEngine:
    """Does what a real model cannot do on demand: fail in the middle, wait for ever, die."""

    def __init__(self, script: list[GenerationChunk | Exception | asyncio.Event]) -> None:
        self.script = script
        self.requests: list[GenerationRequest] = []
        self.was_closed = asyncio.Event()
        self.is_dead = False
        self.is_stopped = False
        self.load = EngineLoad(0, 0)
        self.experts: ExpertLoad | None = None
        self.info = ModelInfo("tiny", "scripted", max_context=64, max_concurrency=1)

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.is_stopped = True

    async def check_health(self) -> None:
        if self.is_dead:
            raise EngineDead("It is dead.")

    async def expert_load(self) -> ExpertLoad | None:
        return self.experts

    async def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        return 7

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.requests.append(request)
        try:
            for step in self.script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.was_closed.set()


class MemoryStore(dict[str, bytes]):
    def put(self, key: str, value: bytes) -> None:
        self[key] = value

    def delete(self, key: str) -> None:
        self.pop(key, None)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        return dict(self)


HELLO = GenerationChunk((1, 2), "Hé")
LAST = GenerationChunk(finish_reason="stop", usage=Usage(3, 2, 1))


class Replica:
    """A started service with a client that knows the secret."""

    def __init__(self, *script: GenerationChunk | Exception | asyncio.Event) -> None:
        self.engine = ScriptedEngine(list(script))
        self.beats = MemoryStore()
        self.service = ModelService(self.engine, SECRET, app="llm-tiny", replica_id="r1", beats=self.beats)

    async def __aenter__(self) -> "Replica":
        await self.service.start()
        self.url = self.service.url
        self.session = aiohttp.ClientSession(self.url, headers={"x-windfarm-internal": SECRET})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        await self.service.stop(drain_s=0)

    async def generate(self, **body) -> tuple[int, list]:
        async with self.session.post("/generate", json=PROMPT | {"render": RENDER} | body) as answer:
            if answer.status != 200:
                return answer.status, [await answer.json()]
            decoder = FrameDecoder()
            frames = decoder.feed(await answer.read())
            decoder.finish()
            return answer.status, frames


async def test_a_chat_comes_as_frames_with_ready_events_and_token_ids() -> None:
    async with Replica(HELLO, LAST) as replica:
        _, frames = await replica.generate()
    assert [frame.kind for frame in frames] == [FrameKind.DATA] * 3 + [FrameKind.END]
    assert [frame.token_ids for frame in frames] == [(), (1, 2), (), ()]
    head = '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"tiny","choices":'
    empty = '"logprobs":null,"finish_reason":null}]}\n\n'
    assert frames[0].payload.decode() == (
        f'data: {head}[{{"index":0,"delta":{{"role":"assistant","content":""}},{empty}'
    )
    assert frames[1].payload.decode() == f'data: {head}[{{"index":0,"delta":{{"content":"Hé"}},{empty}'
    finish, usage = frames[2].payload.decode().split("\n\n", 1)
    assert finish == f'data: {head}[{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"stop"}}]}}'
    assert '"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5' in usage
    assert frames[3].json() == {
        "finish_reason": "stop",
        "usage": {"num_prompt_tokens": 3, "num_completion_tokens": 2, "num_cached_tokens": 1},
    }


async def test_every_field_of_the_request_reaches_the_engine() -> None:
    sampling = {"max_tokens": 3, "logit_bias": {"7": -1}, "stop": ["a"], "seed": 4}
    async with Replica(LAST) as replica:
        await replica.generate(sampling=sampling, tools=[{"type": "function"}])
    (request,) = replica.engine.requests
    assert request.request_id == "r1"
    assert request.tools == [{"type": "function"}]
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.stop) == (3, 4, ("a",))
    assert request.sampling.logit_bias == {7: -1.0}


@pytest.mark.parametrize(
    ("body", "field"),
    [({"surprise": 1}, "surprise"), ({"sampling": {"x": 1}}, "x"), ({"render": {"kind": "pdf"}}, "render")],
)
async def test_a_wrong_body_is_refused_with_the_field(body, field: str) -> None:
    async with Replica(LAST) as replica:
        status, (answer,) = await replica.generate(**body)
    assert status == 400
    assert answer["error"]["param"] == field


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("no", param="top_p"), 400, "invalid_request"),
        (EngineBusy("full"), 503, "engine_busy"),
        (EngineFailed("broke"), 500, "generation_failed"),
        (RuntimeError("a secret path"), 500, "internal_error"),
    ],
)
async def test_a_refusal_before_the_first_chunk_has_a_status(error: Exception, status: int, code: str) -> None:
    async with Replica(error) as replica:
        got, (answer,) = await replica.generate()
    assert (got, answer["error"]["code"]) == (status, code)
    assert "secret path" not in answer["error"]["message"]


async def test_a_failure_in_the_middle_is_an_error_frame_and_no_end() -> None:
    async with Replica(HELLO, EngineFailed("it broke")) as replica:
        _, frames = await replica.generate()
    assert [frame.kind for frame in frames[1:]] == [FrameKind.DATA, FrameKind.ERROR]
    assert frames[-1].json()["message"] == "it broke"


async def test_silence_is_filled_with_keep_alive_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_service, "KEEP_ALIVE_S", 0.02)
    go_on = asyncio.Event()
    async with Replica(go_on, LAST) as replica:
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        _, frames = await replica.generate(render={"kind": "events"})
    assert frames[0].kind is FrameKind.KEEP_ALIVE
    assert frames[-1].kind is FrameKind.END


async def test_a_client_that_goes_away_cancels_its_generation() -> None:
    async with Replica(HELLO, asyncio.Event()) as replica:
        answer = await replica.session.post("/generate", json=PROMPT)
        await answer.content.readany()
        answer.close()
        await replica.engine.was_closed.wait()


@pytest.mark.parametrize("path", ["/generate", "/count_tokens", "/tokenize", "/health", "/", "/nowhere"])
@pytest.mark.parametrize("headers", [{}, {"x-windfarm-internal": "guess"}, {"x-windfarm-internal": SECRET + "x"}])
async def test_without_the_secret_every_path_says_nothing(path: str, headers: dict[str, str]) -> None:
    async with Replica(LAST) as replica, aiohttp.ClientSession(headers=headers) as stranger:
        for method in ("GET", "POST"):
            async with stranger.request(method, replica.url + path, json=PROMPT) as answer:
                assert answer.status == 401
                assert await answer.read() == b""
                assert set(answer.headers) <= {"Content-Length", "Content-Type", "Date", "Connection"}
        assert not replica.engine.requests


async def test_it_counts_and_tells_tokens_and_its_health() -> None:
    async with Replica(LAST) as replica:
        async with replica.session.post("/count_tokens", json=PROMPT) as answer:
            assert await answer.json() == {"num_tokens": 7}
        async with replica.session.post("/tokenize", json={"text": "ab"}) as answer:
            assert await answer.json() == {"token_ids": [97, 98]}
        async with replica.session.post("/tokenize", json={}) as answer:
            assert answer.status == 400
        async with replica.session.get("/health") as answer:
            assert answer.status == 200
        async with replica.session.get("/nowhere") as answer:
            assert answer.status == 404
        await replica.service.check_health()
        replica.engine.is_dead = True
        async with replica.session.get("/health") as answer:
            assert answer.status == 503
        with pytest.raises(EngineDead):
            await replica.service.check_health()


async def test_it_announces_itself_and_leaves_no_record_when_it_stops() -> None:
    async with Replica(LAST) as replica:
        (record,) = map(decode_beat, replica.beats.values())
        assert (record.model, record.url, record.state) == ("tiny", replica.url, "ready")
        assert record.info["max_context"] == 64
    assert not replica.beats
    assert replica.engine.is_stopped


async def test_stopping_drains_the_running_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_service, "_NOTICE_S", 0.0)
    go_on = asyncio.Event()
    async with Replica(HELLO, go_on, LAST) as replica:
        answer = await replica.session.post("/generate", json=PROMPT | {"render": RENDER})
        await answer.content.readany()
        stopping = asyncio.create_task(replica.service.stop())
        while decode_beat(replica.beats["windfarm/llm-tiny/r1"]).state != "draining":  # noqa: ASYNC110
            await asyncio.sleep(0)
        go_on.set()
        frames = FrameDecoder().feed(await answer.read())
        assert frames[-1].kind is FrameKind.END
        await stopping
        with pytest.raises(EngineDead):
            await replica.service.check_health()


async def test_log_probabilities_have_openais_shapes() -> None:
    token = TokenLogprob(5, " é", -0.5, ((" é", -0.5), (" e", -1.5)))
    async with Replica(GenerationChunk((5,), " é", (token,)), LAST) as replica:
        _, chat = await replica.generate()
        _, completion = await replica.generate(render=RENDER | {"kind": "completion"})
        _, events = await replica.generate(render={"kind": "events"})
    assert (
        '"logprobs":{"content":[{"token":" é","logprob":-0.5,"bytes":[32,195,169],"top_logprobs":'
        '[{"token":" é","logprob":-0.5,"bytes":[32,195,169]},{"token":" e","logprob":-1.5,"bytes":[32,101]}]}]}'
    ) in chat[1].payload.decode()
    assert (
        '"text":" é","logprobs":{"tokens":[" é"],"token_logprobs":[-0.5],"top_logprobs":[{" é":-0.5," e":-1.5}],'
        '"text_offset":[0]}'
    ) in completion[0].payload.decode()
    assert events[0].json()["logprobs"] == [
        {"token_id": 5, "token": " é", "logprob": -0.5, "top": [[" é", -0.5], [" e", -1.5]]}
    ]
