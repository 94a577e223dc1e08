"""A `/rerank` service of the tests: real HTTP, and scores that come from the words of question and text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rag.refusal import shared_words
from rag.types import Passage, StoredChunk


def score(query: str, text: str) -> float:
    """The share of the question's words that stand in the text, inflected or not."""
    chunk = StoredChunk("c", "col", "d", "v", "d", text, 0, len(text), 0)
    return shared_words(query, Passage(chunk, 0.0))


class RerankServer(ThreadingHTTPServer):
    """`fault` is what it does wrong. With `likes_last`, what comes later is better, whatever it says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.fault: str | None = None
        self.likes_last = False
        self.url = f"http://127.0.0.1:{self.server_port}/v1/rerank"


class _Handler(BaseHTTPRequestHandler):
    server: RerankServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.seen.append((dict(self.headers), body))
        results = [
            {"index": index, "relevance_score": index if server.likes_last else score(body["query"], text)}
            for index, text in enumerate(body["documents"])
        ]
        results.sort(key=lambda result: -result["relevance_score"])
        answer: Any = {"results": results[: body["top_n"]]}
        if server.fault == "half":
            answer = {"results": results[:1]}
        if server.fault == "shape":
            answer = {"data": results}
        data = b"oops" if server.fault == "text" else json.dumps(answer).encode()
        self.send_response(500 if server.fault == "status" else 200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def rerank_server() -> Iterator[RerankServer]:
    server = RerankServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
