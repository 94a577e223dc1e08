"""The parts of `make bench-overhead` that measure: the load client, the backend that does nothing, and the figures."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.frames import FrameDecoder, FrameKind
from tests.bench import noop_backend
from tests.bench.load_client import AnswerReader, Load, run_load
from tests.bench.noop_backend import NUM_TOKENS, NoopServer, frames
from tests.bench.overhead import Results
from tests.bench.overhead_summary import summarise
from tests.services.harness import events_of, running_endpoint

WITH_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.parametrize("answer", [WITH_LENGTH, CHUNKED])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_end_of_an_answer_is_found_however_it_is_cut(answer: bytes, size: int) -> None:
    reader = AnswerReader()
    for _ in range(2):
        pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
        assert [reader.feed(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_an_answer_that_is_not_200_ends_the_measurement_with_its_text() -> None:
    with pytest.raises(RuntimeError, match=r"not 200: HTTP/1\.1 429(.|\n)*slow down"):
        AnswerReader().feed(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 9\r\n\r\nslow down")


@asynccontextmanager
async def backend() -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(NoopServer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_load_client_counts_what_the_backend_answers(stream: bool) -> None:
    async with backend() as url:
        body = json.dumps({"stream": stream})
        result = await run_load(Load(f"{url}/v1/chat/completions", {}, body, num_clients=3, seconds=0.05))
    assert result.num_answers >= 3
    assert 0 < result.p50_ms <= result.p95_ms < 1000 * result.seconds


def test_the_frames_of_the_backend_are_those_of_a_whole_answer() -> None:
    *data, end = FrameDecoder().feed(frames("events"))
    assert [frame.token_ids for frame in data] == [(number,) for number in range(NUM_TOKENS)] + [()]
    assert end.kind is FrameKind.END
    assert end.json()["usage"]["num_completion_tokens"] == NUM_TOKENS


@pytest.mark.parametrize("stream", [False, True])
async def test_through_the_endpoint_and_straight_from_the_backend_comes_the_same_answer(
    tmp_path: Path, stream: bool
) -> None:
    body = {"model": noop_backend.MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    async with backend() as url, running_endpoint(tmp_path) as running, httpx.AsyncClient(trust_env=False) as client:
        announce(running.beats, url)
        await running.directory.refresh()
        direct = await client.post(f"{url}/v1/chat/completions", json=body)
        through = await running.http.post("/v1/chat/completions", json=body)
    assert direct.status_code == through.status_code == 200, through.text
    if stream:
        assert events_of(through.text) == events_of(direct.text)
    else:
        assert through.json()["choices"] == direct.json()["choices"]
        assert through.json()["usage"]["completion_tokens"] == direct.json()["usage"]["completion_tokens"]


def announce(beats: Any, url: str) -> None:
    from services.discovery import encode_beat
    from tests.bench.announce import endpoint_of

    endpoint = endpoint_of(noop_backend.MODEL, url, num_slots=4)
    beats.put(endpoint.key, encode_beat(endpoint))


def relay_sample(direct_ms: float, ours: tuple[float, float], theirs: tuple[float, float]) -> dict[str, Any]:
    """(latency in ms, requests per second of the better rung) of windfarm and LiteLLM."""

    def proxy(latency_ms: float, per_second: float) -> dict[str, Any]:
        ladder = {"4": per_second / 2, "16": per_second}
        return {
            "p50_ms": latency_ms,
            "p95_ms": 2 * latency_ms,
            "per_second": ladder,
            "cpu_ms": 1.0,
            "client_cpu_ms": 0.1,
        }

    sample: dict[str, Any] = {}
    for kind in ("whole", "stream"):
        sample[f"{kind}.direct"] = {"p50_ms": direct_ms, "p95_ms": direct_ms}
        sample |= {f"{kind}.{name}": proxy(*ours) for name in ("windfarm", "windfarm_limited")}
        sample[f"{kind}.litellm"] = proxy(*theirs)
    return sample


def test_figures_of_the_relay_are_differences_and_ratios_of_the_same_round() -> None:
    rounds = [
        relay_sample(1.0, (2.5, 800.0), (9.0, 100.0)),
        relay_sample(0.5, (1.5, 400.0), (8.0, 100.0)),
        relay_sample(2.0, (3.2, 900.0), (12.0, 150.0)),
    ]
    figures = summarise({"relay": rounds})
    assert figures["relay_added_p50_ms"] == 1.2
    assert figures["relay_added_p50_ms_interval_95"] == [1.0, 1.5]
    assert figures["relay_added_p95_ms"] == 4.0
    assert figures["relay_rps_vs_litellm"] == 6.0
    assert figures["relay_ladder"] == {"4": 400.0, "16": 800.0}
    assert figures["litellm_rps"] == 100.0


def test_figures_of_streams_name_engine_server_and_number() -> None:
    def run(rate: float, first_s: float, outside_ms: float) -> dict[str, float]:
        return {
            "tokens_per_s": rate,
            "first_token_s": first_s,
            "client_cpu_s": 0.5,
            "num_tokens": 32,
            "outside_cpu_ms": outside_ms,
            "endpoint_cpu_ms": 0.2,
        }

    rounds = [
        {"windfarm": run(97, 0.06, 0.5), "bare": run(100, 0.055, 0.4), "ray_serve_llm": run(60, 0.12, 1.4)},
    ]
    figures = summarise({"vllm/32": rounds, "llamacpp/1": rounds})
    assert (figures["ratio_tok_s_32"], figures["ray_serve_llm_ratio_tok_s_32"]) == (0.97, 0.6)
    assert (figures["added_ttft_ms_32"], figures["ray_serve_llm_added_ttft_ms_32"]) == (5.0, 65.0)
    assert figures["cpu_ms_per_token_outside_engine_32_windfarm"] == 0.5
    assert figures["llamacpp_ratio_tok_s_1"] == 0.97
    assert "llamacpp_cpu_ms_per_token_outside_engine_1_bare" not in figures


def test_rounds_of_several_runs_add_up(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for number in range(2):
        Results(path).keeper("relay")({"number": number})
    assert Results(path).samples == {"relay": [{"number": 0}, {"number": 1}]}
