"""OpenAI's filters of file attributes: comparisons, joined by and and or, as one function of a file's attributes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from services.errors import ApiError, invalid

Attributes = Mapping[str, str | float | bool]
Matches = Callable[[Attributes], bool]

_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
_MAX_DEPTH, _MAX_FILTERS = 8, 100


def compile_attribute_filter(wanted: object) -> Matches:
    """`{"type": "eq", "key": ..., "value": ...}` or `{"type": "and", "filters": [...]}`; 400 for anything else.

    A file without the attribute matches `ne` and `nin` alone. Numbers and texts are never equal or in order.
    """
    return _compile(wanted, "filters", 0)


def _compile(wanted: object, path: str, depth: int) -> Matches:
    if not isinstance(wanted, dict) or depth > _MAX_DEPTH:
        raise _wrong(path, f"an object is expected, nested at most {_MAX_DEPTH} deep")
    kind = wanted.get("type")
    if kind in ("and", "or"):
        _check_fields(wanted, {"type", "filters"}, path)
        filters = wanted.get("filters")
        if not isinstance(filters, list) or not 1 <= len(filters) <= _MAX_FILTERS:
            raise _wrong(f"{path}.filters", f"a list of 1 to {_MAX_FILTERS} filters is expected")
        parts = [_compile(part, f"{path}.filters[{index}]", depth + 1) for index, part in enumerate(filters)]
        join = all if kind == "and" else any
        return lambda attributes: join(matches(attributes) for matches in parts)
    _check_fields(wanted, {"type", "key", "value"}, path)
    key, value = wanted.get("key"), wanted.get("value")
    if not isinstance(key, str):
        raise _wrong(f"{path}.key", "the name of an attribute is expected")
    return _comparison(str(kind), key, value, path)


def _comparison(kind: str, key: str, value: Any, path: str) -> Matches:
    if kind in ("in", "nin"):
        if not isinstance(value, list) or not all(_is_value(entry) for entry in value):
            raise _wrong(f"{path}.value", "a list of texts and numbers is expected")
        is_in = kind == "in"
        return lambda attributes: any(_same(attributes.get(key), entry) for entry in value) == is_in
    if not _is_value(value):
        raise _wrong(f"{path}.value", "a text, a number or a truth value is expected")
    if kind in ("eq", "ne"):
        is_equal = kind == "eq"
        return lambda attributes: _same(attributes.get(key), value) == is_equal
    if kind not in _ORDERED:
        raise _wrong(f"{path}.type", "one of eq, ne, gt, gte, lt, lte, in, nin, and, or is expected")
    compare = _ORDERED[kind]
    return lambda attributes: _is_comparable(attributes.get(key), value) and compare(attributes[key], value)


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _is_comparable(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return False
    return (isinstance(one, int | float) and isinstance(other, int | float)) or (
        isinstance(one, str) and isinstance(other, str)
    )


def _is_value(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _check_fields(wanted: dict[str, Any], known: set[str], path: str) -> None:
    if unknown := sorted(wanted.keys() - known):
        raise _wrong(f"{path}.{unknown[0]}", f"it is not a known field; known are {', '.join(sorted(known))}")


def _wrong(path: str, expected: str) -> ApiError:
    return invalid(f"'{path}' is wrong: {expected}.", param=path, code="invalid_filter")
