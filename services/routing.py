"""A small router in plain ASGI: path templates to handlers, one record per request.

A handler gets a `Call` and returns an `Answer`, or `None` when it has sent its answer itself (a stream). What goes
wrong is raised, never returned. Nothing here knows what the routes do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

from services.accounts import Actor
from services.errors import ApiError, invalid
from services.event_stream import ClientGone, Receive, Send
from services.token_meter import TokenMeter
from services.validation import Body, parse_body

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(json.dumps(value, ensure_ascii=False).encode(), status, headers=headers or {})


def list_answer(entries: list[Any]) -> Answer:
    return json_answer({"object": "list", "data": entries})


class Permit(Protocol):
    """A request that the limits of its key let in. What it uses is counted, and booked once."""

    meter: TokenMeter

    def close(self, *, has_failed: bool = False) -> None: ...

    async def settle(self, *, has_failed: bool = False) -> None: ...


class Call:
    """One request on its way through the endpoint, with what is learned of it for log and metrics."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send, request_id: str) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.request_id = request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.parameters: dict[str, str] = {}
        self.route = "unknown"
        self.started_at = time.monotonic()
        self.first_token_at: float | None = None
        self.model = ""
        self.client_user: str | None = None
        self.status = 200
        self.permit: Permit | None = None
        """Only where the key has limits."""
        self.answer_headers: dict[str, str] = {}
        """Go along with every answer to this request, also with a refusal."""
        self._actor: Actor | None = None

    @cached_property
    def headers(self) -> dict[str, str]:
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.scope["headers"]}

    @cached_property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True))

    @property
    def actor(self) -> Actor:
        assert self._actor is not None, "this route is open, nobody is signed in"
        return self._actor

    def sign_in(self, actor: Actor) -> None:
        self._actor = actor

    @property
    def actor_name(self) -> str:
        """For the log: never a key."""
        return self._actor.name if self._actor else "-"

    async def body(self, max_mib: float) -> bytes:
        """The whole body; 413 when it is longer than allowed."""
        limit = int(max_mib * _MIB)
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif (
                size > 2 * limit
            ):  # up to here it is read and dropped: most clients read no answer before they sent all
                raise body_too_long(max_mib)
            if not message.get("more_body", False):
                break
        if size > limit:
            raise body_too_long(max_mib)
        return b"".join(chunks)

    async def parse(self, kind: type[Body], max_mib: float) -> Body:
        content_type = self.headers.get("content-type", "application/json")
        if not content_type.lower().startswith(("application/json", "text/json")):
            raise ApiError(
                415,
                "invalid_request_error",
                "unsupported_media_type",
                f"The body is '{content_type}', but JSON is expected. Send `Content-Type: application/json`.",
            )
        return parse_body(kind, await self.body(max_mib))

    @property
    def meter(self) -> TokenMeter | None:
        return self.permit.meter if self.permit is not None else None

    async def answer(self, answer: Answer, extra: Mapping[str, str]) -> None:
        headers = {"content-type": answer.content_type, "content-length": str(len(answer.body))}
        headers |= {**answer.headers, **self.answer_headers, **extra}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": answer.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else answer.body})


Handler = Callable[[Call], Awaitable[Answer | None]]


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    template: str
    handler: Handler
    is_open: bool = False
    """Open routes need no key, and must not tell more than a status."""


class Router:
    def __init__(self, routes: list[Route]) -> None:
        self._fixed: dict[str, dict[str, Route]] = {}
        self._templates: list[tuple[list[str], dict[str, Route]]] = []
        for route in routes:
            self._methods_of(route.template)[route.method] = route

    def find(self, method: str, raw_path: str) -> tuple[Route, dict[str, str]] | None:
        """The route and its parameters; `None` for an unknown path, 405 for a known one with another method."""
        methods, parameters = self._match(raw_path)
        if methods is None:
            return None
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            allowed = ", ".join(sorted(methods))
            raise ApiError(
                405, "invalid_request_error", "method_not_allowed", f"{method} is not possible here, only {allowed}."
            )
        return route, parameters

    def _match(self, raw_path: str) -> tuple[dict[str, Route] | None, dict[str, str]]:
        fixed = self._fixed.get(raw_path)
        if fixed is not None:
            return fixed, {}
        parts = raw_path.split("/")
        for template, methods in self._templates:
            if len(template) != len(parts):
                continue
            pairs = list(zip(template, parts, strict=True))
            if all(t[:1] == "{" or t == p for t, p in pairs):
                return methods, {t[1:-1]: unquote(p) for t, p in pairs if t[:1] == "{"}
        return None, {}

    def _methods_of(self, template: str) -> dict[str, Route]:
        if "{" not in template:
            return self._fixed.setdefault(template, {})
        parts = template.split("/")
        for known, methods in self._templates:
            if known == parts:
                return methods
        self._templates.append((parts, methods := {}))
        return methods


def flag(call: Call, name: str) -> bool:
    """A yes-or-no parameter of the query string."""
    value = call.query.get(name, "false").lower()
    if value not in ("true", "false", "1", "0", ""):
        raise invalid(f"'{name}' is '{value}', but true or false is expected.", param=name, code="invalid_value")
    return value in ("true", "1", "") if name in call.query else False


def body_too_long(max_mib: float) -> ApiError:
    return ApiError(
        413,
        "invalid_request_error",
        "body_too_long",
        f"The body is longer than the {max_mib:g} MiB that are allowed here (max_body_mib in ray_config.yaml).",
    )
