from __future__ import annotations

import asyncio

import pytest

from services.tools import TOOLS
from services.tools.registry import Tool, ToolArguments, ToolContext, ToolError, run_tool


def test_every_tool_describes_itself_as_openai_does() -> None:
    for name, tool in TOOLS.items():
        function = tool.schema["function"]
        assert function["name"] == name
        assert function["description"]
        assert function["parameters"]["type"] == "object"
        assert function["parameters"]["additionalProperties"] is False
        assert all(
            "description" in field and "title" not in field for field in function["parameters"]["properties"].values()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{}", "expression: Field required"),
        ('{"expression": 5}', "expression: Input should be a valid string"),
        ('{"expression": "1", "precision": 3}', "precision: Extra inputs"),
        ("[1]", "should be an object|arguments"),
        ("not json", "Invalid JSON"),
        ("", "Field required"),
    ],
)
async def test_wrong_arguments_are_told_with_the_field(arguments: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        await run_tool(TOOLS["calculator"], arguments, ToolContext(), timeout_s=5)


async def test_a_slow_tool_is_ended() -> None:
    class NoArguments(ToolArguments):
        pass

    async def wait_for_ever(arguments: NoArguments, context: ToolContext) -> str:
        await asyncio.Event().wait()
        return "never"

    slow = Tool("slow", "waits", NoArguments, wait_for_ever)
    with pytest.raises(ToolError, match=r"slow did not finish within 0\.01 s"):
        await run_tool(slow, "{}", ToolContext(), timeout_s=0.01)
