"""Renders chat messages with a model's own template, alike for every engine.

Templates are Jinja programs that come with the weights: they run in a sandbox that can change nothing. The rendered
text is tokenized without special tokens added, because the template writes them itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from cluster.errors import InvalidRequest, ModelDamaged
from cluster.gguf_metadata import GgufMetadata


class ChatTemplate:
    """One model's template. `special_tokens` are the names that templates use: bos_token, eos_token, ..."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str], *, model: str) -> None:
        self._model = model
        self._special_tokens = dict(special_tokens)
        self._template: jinja2.Template | None = None
        self.knows_tools = False
        """Whether the template has a place for tool schemas."""
        if source is None:
            return
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ModelDamaged(f"The chat template of {model} is no valid Jinja template: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt text, ready for the assistant's turn. Raises `InvalidRequest` where the template refuses."""
        if self._template is None:
            raise InvalidRequest(
                f"{self._model} has no chat template. Use /v1/completions, or serve an instruction-tuned model.",
                param="messages",
                code="no_chat_template",
            )
        try:
            return self._template.render(
                messages=[_plain_message(message) for message in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(
                f"The chat template of {self._model} refuses these messages: {error}", param="messages"
            ) from error


def template_from_gguf(metadata: GgufMetadata, *, model: str) -> ChatTemplate:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {template_name: metadata.special_token(name) for name, template_name in names.items()}
    return ChatTemplate(metadata.text("tokenizer.chat_template"), special, model=model)


def template_from_folder(folder: Path, *, model: str) -> ChatTemplate:
    """From `chat_template.jinja` or `tokenizer_config.json` of a Hugging Face checkpoint."""
    config_file = folder / "tokenizer_config.json"
    try:
        config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
    except ValueError as error:
        raise ModelDamaged(f"{config_file} is not valid JSON: {error}. Copy the checkpoint again.") from error
    special = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    template_file = folder / "chat_template.jinja"
    source = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates; "default" is the one for chat
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return ChatTemplate(source, special, model=model)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The dialect of chat templates, as Transformers documents it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
    environment.filters["tojson"] = _to_json
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here it is just its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Content parts become one text, and tool arguments objects: that is what templates expect."""
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = _plain_content(message.get("content"))
    if message.get("tool_calls"):
        plain["tool_calls"] = [_plain_tool_call(call) for call in message["tool_calls"]]
    return plain


def _plain_content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.get("type") != "text":
            raise InvalidRequest(
                f"Content of type {part.get('type')!r} is not supported: this model reads text only.",
                param="messages",
                code="unsupported_content",
            )
        texts.append(part["text"])
    return "".join(texts)


def _plain_tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except ValueError as error:
            raise InvalidRequest(
                f"The arguments of the tool call {function.get('name')!r} are not valid JSON: {error}", param="messages"
            ) from error
    return {**call, "function": function}
