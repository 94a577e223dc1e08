"""Search in the request's collections as a tool. The model chooses the words, never the collections: those come from
the request, where access to them was checked."""

from __future__ import annotations

from pydantic import Field

from rag.refusal import judge_evidence
from rag.types import Passage
from services.tools.registry import Tool, ToolArguments, ToolContext, ToolError

NAME = "knowledge_search"


class KnowledgeArguments(ToolArguments):
    query: str = Field(min_length=1, max_length=500, description="What to look for, as a question or keywords.")
    top_k: int = Field(default=3, ge=1, le=10, description="How many passages to return.")


async def _run(arguments: KnowledgeArguments, context: ToolContext) -> str:
    if context.searcher is None or not context.collections:
        raise ToolError("No collection was chosen for this chat; there is nothing to search.")
    async with context.search_turn(arguments.query):
        found = await context.searcher.search(
            context.collections, arguments.query, top_k=arguments.top_k, actor=context.actor
        )
    context.collection_names.update(found.collection_names)
    own = {} if context.is_threshold_asked else found.thresholds
    if not judge_evidence(arguments.query, found.passages, context.evidence_threshold, own).is_found:
        return "The documents say nothing about this. Tell the user so."
    return "\n\n".join(f"[{_number(passage, context)}] {_text(passage)}" for passage in found.passages)


def _text(passage: Passage) -> str:
    """Rows of a table are understood below its header only."""
    header = passage.chunk.table_header
    return f"{header}\n{passage.chunk.text}" if header else passage.chunk.text


KNOWLEDGE_SEARCH = Tool(
    NAME, "Searches the documents of this chat for passages to answer from.", KnowledgeArguments, _run
)


def _number(passage: Passage, context: ToolContext) -> int:
    """A passage that is known already keeps its number, so that [2] means the same in the whole answer."""
    key = (passage.chunk.version_id, passage.chunk.index)
    for number, known in enumerate(context.passages, start=1):
        if (known.chunk.version_id, known.chunk.index) == key:
            return number
    context.passages.append(passage)
    return len(context.passages)
