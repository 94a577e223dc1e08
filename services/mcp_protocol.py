"""The Model Context Protocol over streamable HTTP, as far as a server of tools without sessions needs it.

Specification: modelcontextprotocol.io, revisions 2025-06-18 and 2025-11-25. One JSON-RPC message in, at most one out,
as plain JSON; no stream is opened from here, so nothing has to be remembered between two requests. The official package
brings a session manager, task groups and some fifteen further packages for what is one dispatch table here.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.accounts import Actor
from services.error_responses import is_expected, to_api_error

VERSIONS = ("2025-06-18", "2025-11-25")
PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """`call` gets checked arguments and returns a JSON object; what it raises is told to the model."""

    name: str
    title: str
    description: str
    parameters: Json
    """JSON schema of the arguments."""
    check: Callable[[Json], Any]
    """Arguments as a record; raises `ApiError` where they are wrong."""
    call: Callable[[Any, Actor], Awaitable[Json]]
    """Takes the record and who asks."""


class RpcError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class McpServer:
    def __init__(self, name: str, version: str, instructions: str, tools: Sequence[Tool]) -> None:
        self._about = {"name": name, "title": name, "version": version}
        self._instructions = instructions
        self._tools = {tool.name: tool for tool in tools}

    async def answer(self, body: bytes, actor: Actor) -> Json | None:
        """The response to one message; none where it is a notification or a response."""
        message_id: Any = None
        try:
            message = _message(body)
            message_id = message.get("id")
            if "method" not in message:
                return None  # A response: nothing was asked from here.
            if "id" not in message:
                return None
            result = await self._handle(str(message["method"]), _params(message), actor)
        except RpcError as error:
            return {"jsonrpc": "2.0", "id": message_id, "error": {"code": error.code, "message": str(error)}}
        return {"jsonrpc": "2.0", "id": message_id, "result": result}

    async def _handle(self, method: str, params: Json, actor: Actor) -> Json:
        match method:
            case "initialize":
                return self._initialize(params)
            case "ping":
                return {}
            case "tools/list":
                return {"tools": [_tool_json(tool) for tool in self._tools.values()]}
            case "tools/call":
                return await self._call(params, actor)
        raise RpcError(METHOD_NOT_FOUND, f"There is no method {method[:80]!r} here.")

    def _initialize(self, params: Json) -> Json:
        wanted = params.get("protocolVersion")
        return {
            "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[-1],
            "capabilities": {"tools": {"listChanged": False}},
            "serverInfo": self._about,
            "instructions": self._instructions,
        }

    async def _call(self, params: Json, actor: Actor) -> Json:
        tool = self._tools.get(str(params.get("name")))
        if tool is None:
            known = ", ".join(self._tools)
            raise RpcError(INVALID_PARAMS, f"There is no tool {str(params.get('name'))[:80]!r}. There are: {known}.")
        arguments = params.get("arguments") or {}
        if not isinstance(arguments, dict):
            raise RpcError(INVALID_PARAMS, "'arguments' is not an object.")
        try:
            result = await tool.call(tool.check(arguments), actor)
        except Exception as error:
            # What a model can put right goes to the model; our own faults go to the log as everywhere.
            if not is_expected(error):
                raise
            return {"content": [_text(to_api_error(error).message)], "isError": True}
        shown = json.dumps(result, ensure_ascii=False)
        return {"content": [_text(shown)], "structuredContent": result, "isError": False}


def _message(body: bytes) -> Json:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RpcError(PARSE_ERROR, "The body is not JSON.") from error
    if isinstance(message, list):
        raise RpcError(INVALID_REQUEST, "Batches are not part of this protocol version. Send one message.")
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'The body is no JSON-RPC message ("jsonrpc": "2.0" is missing).')
    if not isinstance(message.get("id"), str | int | None) or isinstance(message.get("id"), bool):
        raise RpcError(INVALID_REQUEST, "The id is neither a text nor a number.")
    if "id" in message and message["id"] is None:
        raise RpcError(INVALID_REQUEST, "The id is null.")
    return message


def _params(message: Mapping[str, Any]) -> Json:
    params = message.get("params", {})
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS, "'params' is not an object.")
    return params


def _tool_json(tool: Tool) -> Json:
    return {
        "name": tool.name,
        "title": tool.title,
        "description": tool.description,
        "inputSchema": tool.parameters,
        "annotations": {"title": tool.title, "readOnlyHint": True, "openWorldHint": False},
    }


def _text(text: str) -> Json:
    return {"type": "text", "text": text}
