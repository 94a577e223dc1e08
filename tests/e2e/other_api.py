"""Somebody else's OpenAI-compatible API for tests: one model that answers every chat with the same sentence."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def other_api(sentence: str) -> Iterator[str]:
    """Serve it on loopback; gives the address to name as a model's `source`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("application/json", [json.dumps({"data": [{"id": "second", "max_model_len": 2048}]})])

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
            events = [_event({"content": word + " "}) for word in sentence.split()]
            events += [_event({}, "stop"), json.dumps({"choices": [], "usage": usage}), "[DONE]"]
            self._answer("text/event-stream", [f"data: {event}\n\n" for event in events])

        def _answer(self, kind: str, pieces: list[str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def _event(delta: dict[str, str], finish_reason: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})
