"""Tools that run on the server, by the names that requests use."""

from services.tools.calculator import CALCULATOR
from services.tools.clock import CLOCK
from services.tools.knowledge import KNOWLEDGE_SEARCH
from services.tools.registry import Tool

TOOLS: dict[str, Tool] = {tool.name: tool for tool in (CALCULATOR, CLOCK, KNOWLEDGE_SEARCH)}
