"""Chat templates render as their authors meant, alike from both model formats, and can do no harm."""

import json
from pathlib import Path

import pytest

from cluster.catalogue import TINY
from cluster.chat_template import ChatTemplate, template_from_folder, template_from_gguf
from cluster.errors import InvalidRequest, ModelDamaged
from cluster.gguf_metadata import read_gguf_metadata

HELLO = [{"role": "user", "content": "hello"}]
CHATML = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
)


def template(source: str | None, **special: str) -> ChatTemplate:
    return ChatTemplate(source, special, model="m")


def test_both_formats_of_a_model_render_alike(tmp_path: Path) -> None:
    metadata = read_gguf_metadata(TINY.file.locate())
    (tmp_path / "chat_template.jinja").write_text(metadata.text("tokenizer.chat_template") or "")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|im_start|>"}}))
    assert template_from_gguf(metadata, model="m").render(HELLO) == CHATML
    assert template_from_folder(tmp_path, model="m").render(HELLO) == CHATML


def test_the_template_may_lie_in_the_tokenizers_configuration(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    for value in ("{{ bos_token }}yes", named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": value}))
        assert template_from_folder(tmp_path, model="m").render(HELLO) == "<s>yes"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelDamaged, match="not valid JSON"):
        template_from_folder(tmp_path, model="m")


def test_content_parts_become_one_text_and_tool_arguments_become_objects() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"ä": [1]}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert template(source).render(messages) == 'ab{"ä": [1]}'
    call["function"]["arguments"] = "{"
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        template(source).render(messages)


def test_it_knows_whether_the_template_shows_tools() -> None:
    with_tools = template("{% if tools %}{{ tools[0].function.name }}{% endif %}")
    assert with_tools.knows_tools
    assert with_tools.render(HELLO, [{"type": "function", "function": {"name": "add"}}]) == "add"
    assert with_tools.render(HELLO) == ""
    assert not template("{{ messages[0].content }}").knows_tools


def test_the_dialect_of_templates_is_understood() -> None:
    source = (
        "{%- for m in messages %}\n    {%- if loop.first %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y')[:2] }}"
    )
    assert template(source).render([*HELLO, {"role": "assistant", "content": " hi "}]) == "hi20"


def test_what_the_template_refuses_is_the_requests_fault() -> None:
    strict = template("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}")
    with pytest.raises(InvalidRequest, match="system first"):
        strict.render(HELLO)
    with pytest.raises(InvalidRequest, match="image_url"):
        template("x").render([{"role": "user", "content": [{"type": "image_url"}]}])


def test_a_template_can_neither_reach_python_nor_change_the_messages() -> None:
    for attack in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(InvalidRequest):
            template(attack).render(HELLO)


def test_a_model_without_a_template_says_what_to_use_instead() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        template(None).render(HELLO)
    with pytest.raises(ModelDamaged, match="Jinja"):
        template("{% if %}")
