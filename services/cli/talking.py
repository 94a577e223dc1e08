"""`ask` and `chat`: answers in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption, ModelOption
from services.cli.output import put, put_json, say

if TYPE_CHECKING:
    from services.api_client import ApiClient

CollectionsOption = Annotated[
    list[str] | None, typer.Option("--collection", "-c", help="Answer from this collection; may be repeated.")
]
MaxTokensOption = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]
TemperatureOption = Annotated[float | None, typer.Option(min=0, max=2, help="0: always the likeliest word.")]


def ask(
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    collection: CollectionsOption = None,
    model: ModelOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask one question; the answer streams, with its sources below."""
    from services.cli.client import open_client

    text = sys.stdin.read() if question == "-" else question
    with open_client(home, api, key) as client:
        body = _body(client, [{"role": "user", "content": text}], collection, model, max_tokens, temperature)
        answer = _Answer(print_text=not as_json)
        answer.read(client.chat(body))
    if as_json:
        put_json(
            {
                "answer": answer.text,
                "citations": answer.citations,
                "evidence": answer.evidence,
                "unsupported": answer.unsupported,
            }
        )
    else:
        answer.print_sources()


def chat(
    collection: CollectionsOption = None,
    model: ModelOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Talk in the terminal. An empty line or ctrl-D ends it; ctrl-C stops an answer."""
    from services.cli.client import open_client

    messages: list[dict[str, Any]] = []
    with open_client(home, api, key) as client:
        while text := _read_question():
            messages.append({"role": "user", "content": text})
            answer = _Answer(print_text=True)
            try:
                answer.read(client.chat(_body(client, messages, collection, model, max_tokens, temperature)))
            except KeyboardInterrupt:
                put(" (stopped)")
            answer.print_sources()
            messages.append({"role": "assistant", "content": answer.text})


def _read_question() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _body(
    client: ApiClient,
    messages: list[dict[str, Any]],
    collections: list[str] | None,
    model: str | None,
    max_tokens: int | None,
    temperature: float | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model or client.default_model(), "messages": messages}
    if collections:
        body["knowledge"] = {"collections": collections}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if temperature is not None:
        body["temperature"] = temperature
    return body


class _Answer:
    """Collects a stream, and prints its text as it comes."""

    def __init__(self, *, print_text: bool) -> None:
        self.text = ""
        self.citations: list[dict[str, Any]] = []
        self.evidence: str | None = None
        self.unsupported: list[str] = []
        self._print = print_text

    def read(self, chunks: Iterator[Mapping[str, Any]]) -> None:
        for chunk in chunks:
            self._take_event(chunk.get("windfarm") or {})
            for choice in chunk.get("choices", ()):
                self._take_text((choice.get("delta") or {}).get("content") or "")
        if self._print:
            put("")

    def print_sources(self) -> None:
        for citation in self.citations:
            page = f", page {citation['page']}" if citation.get("page") else ""
            quote = " ".join(str(citation.get("text", "")).split())
            put(f"[{citation['number']}] {citation['document']}{page}: {quote[:160]}")
        for sentence in self.unsupported:
            put(f"Not confirmed by the documents: {' '.join(sentence.split())[:160]}")

    def _take_text(self, text: str) -> None:
        self.text += text
        if self._print and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _take_event(self, event: Mapping[str, Any]) -> None:
        match event.get("event"):
            case "citations":
                self.citations = list(event.get("citations", ()))
                self.evidence = event.get("evidence")
                if event.get("answer") is not None:
                    self._replace(str(event["answer"]))
                self.unsupported = [self.text[start:end] for start, end in event.get("unsupported", ())]
            case "retrieval" if event.get("rewritten"):
                say(f"(searched for: {event.get('query')})")
            case "tool_call":
                say(f"(tool {event.get('name')})")
            case "context":
                say(f"(left out: {event.get('omitted')})")

    def _replace(self, text: str) -> None:
        """The server attached citation marks to sentences that it had already sent."""
        if self._print and text != self.text:
            sys.stdout.write(f"\n\n{text}" if not text.startswith(self.text) else text[len(self.text) :])
            sys.stdout.flush()
        self.text = text
