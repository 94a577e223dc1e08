"""One chat stream over HTTP, timed. The same small client for every server: it reads lines and does not parse more
than it must, because it shares the cores with what it measures.
"""

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Timing:
    """Seconds count from the moment the request was sent. `num_tokens` is what the server's usage says."""

    first_token_s: float
    total_s: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Of the whole answer, the wait for its first token included: what somebody in front of it sees."""
        return self.num_tokens / self.total_s


def stream_chat(base_url: str, key: str | None, model: str, prompt: str, max_tokens: int) -> Timing:
    """Ask, read to the end, and tell how long it took. `base_url` ends in /v1."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    url = urlsplit(base_url)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=300)
    started = time.perf_counter()
    connection.request("POST", f"{url.path}/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{base_url} answers {response.status}: {response.read(2000).decode(errors='replace')}")
    first_token_s, last_lines = read_stream(response, started)
    total_s = time.perf_counter() - started
    connection.close()
    if first_token_s is None:
        raise RuntimeError(f"{base_url} ended its stream without a token: {last_lines}")
    return Timing(first_token_s, total_s, num_tokens(last_lines))


def read_stream(response: http.client.HTTPResponse, started: float) -> tuple[float | None, list[bytes]]:
    """Seconds to the first chunk with text, and the last few data lines, which hold the usage."""
    first_token_s, lines = None, []
    while line := response.readline():
        if not line.startswith(b"data: "):
            continue
        if first_token_s is None and has_text(line):
            first_token_s = time.perf_counter() - started
        lines = [*lines[-3:], line]
        if line.startswith(b"data: [DONE]"):
            return first_token_s, lines
    raise RuntimeError(f"the stream ended without [DONE]: {lines}")


def has_text(line: bytes) -> bool:
    choices = json.loads(line[6:]).get("choices") or [{}]
    return bool(choices[0].get("delta", {}).get("content"))


def num_tokens(lines: list[bytes]) -> int:
    chunks: list[dict[str, Any]] = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    usage = next(chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage"))
    return int(usage["completion_tokens"])
