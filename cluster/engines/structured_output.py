"""JSON schemas as grammars for guided generation, checked before an engine sees them.

llama.cpp generates without any guide where it cannot compile a schema; so the compiler that it uses is asked first, and
what it cannot do is an error that says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from cluster.errors import InvalidRequest


def compact_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with one fixed way to put blanks: small models fill the answer with blanks where any are allowed."""
    return {**schema, "x-guidance": {"whitespace_flexible": False}}


def json_schema_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of all JSON texts that `schema` allows. Raises `InvalidRequest` where it cannot be guided."""
    grammar = f"%llguidance {{}}\nstart: %json {json.dumps(compact_schema(schema))}"
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        reason = problem.split("\n", 1)[0].removeprefix("at 2(8): ")
        raise InvalidRequest(f"This JSON schema cannot guide the answer: {reason}", param="response_format")
    return grammar
