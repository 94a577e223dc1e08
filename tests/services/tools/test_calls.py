from __future__ import annotations

import pytest

from services.tools.calls import MalformedCall, ParsedCall, ToolCallReader, parse_calls

ADD = ParsedCall("calculator", '{"expression": "2+3"}')
CLOCK = ParsedCall("datetime", "{}")

WRITTEN = [
    ('<tool_call>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call>', [ADD]),
    ('<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n', [ADD]),
    ('<tool_call>{"name": "calculator", "arguments": "{\\"expression\\": \\"2+3\\"}"}</tool_call>', [ADD]),
    ('<tool_call>{"name": "calculator", "parameters": {"expression": "2+3"}}</tool_call>', [ADD]),
    (
        (
            '<tool_call>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call>\n'
            '<tool_call>{"name": "datetime"}</tool_call> thanks'
        ),
        [ADD, CLOCK],
    ),
    ('[TOOL_CALLS] [{"name": "calculator", "arguments": {"expression": "2+3"}}, {"name": "datetime"}]', [ADD, CLOCK]),
    ('[TOOL_CALLS]calculator{"expression": "2+3"}', [ADD]),
    ('[TOOL_CALLS]calculator[ARGS]{"expression": "2+3"}[TOOL_CALLS]datetime[ARGS]{}', [ADD, CLOCK]),
    ('[TOOL_CALLS]calculator[CALL_ID]abc123def[ARGS]{"expression": "2+3"}', [ADD]),
]


@pytest.mark.parametrize(("text", "calls"), WRITTEN)
def test_both_formats_are_read(text: str, calls: list[ParsedCall]) -> None:
    assert parse_calls(text) == calls


@pytest.mark.parametrize(("text", "calls"), WRITTEN)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_shows_the_text_before_a_call_and_never_a_part_of_it(
    text: str, calls: list[ParsedCall], size: int
) -> None:
    reader = ToolCallReader()
    stream = "Let me see [1] <b>. " + text
    shown = "".join(reader.feed(stream[place : place + size]) for place in range(0, len(stream), size))
    assert shown == "Let me see [1] <b>. "
    assert reader.finish() == ("", calls)


@pytest.mark.parametrize("text", ["a < b and [1]", "<tool", "ends with [TOOL_CALL", "no call", "", "<tool_cal l>"])
def test_text_that_only_looks_like_a_call_is_shown_whole(text: str) -> None:
    reader = ToolCallReader()
    shown = "".join(reader.feed(letter) for letter in text)
    rest, calls = reader.finish()
    assert shown + rest == text
    assert calls == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tool_call>{not json}</tool_call>", "no valid JSON"),
        ('<tool_call>{"name": "calculator", "arguments": {"expr', "no valid JSON"),
        ("<tool_call></tool_call>", "empty"),
        ('<tool_call>{"arguments": {}}</tool_call>', "name"),
        ('<tool_call>{"name": "calculator", "arguments": [1]}</tool_call>', "JSON object"),
        ("<tool_call>[]</tool_call>", "JSON object"),
        ("[TOOL_CALLS]", "empty"),
        ("[TOOL_CALLS] [5]", "JSON object"),
        ("[TOOL_CALLS]calculator{", "no valid JSON"),
        ("<tool_call>" + "[" * 100_000, "nested|no valid JSON"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(MalformedCall, match=message):
        parse_calls(text)
