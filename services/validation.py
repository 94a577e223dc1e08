"""From the bytes of a request body to a checked record, or to a 400 that names the field, the cause and a way out.

Pure functions without transport. Every request record forbids fields that it does not know; a field that the public
API documents but windfarm does not serve is declared with the type `None` and a reason in `REFUSED`.
"""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from services.errors import ApiError, invalid


class RequestBody(BaseModel):
    """Base of all request records: closed, strict about types (a number in quotes is no number)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)

    REFUSED: ClassVar[dict[str, str]] = {}
    """Documented fields that are not served, with what to do instead."""


Body = TypeVar("Body", bound=RequestBody)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """The record of a JSON body; `ApiError` 400 for anything else."""
    if not body.strip():
        raise invalid("The body is empty. Send a JSON object.", code="empty_body")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise describe(kind, error) from None


def describe(kind: type[BaseModel], error: ValidationError) -> ApiError:
    """The clearest single sentence about what is wrong: unknown fields first, because they often cause the rest.

    Where a value may have one of several shapes, the shape that fitted farthest is the one that was meant.
    """
    details = error.errors(include_url=False)
    first = next((detail for detail in details if detail["type"] in ("extra_forbidden", "none_required")), details[0])
    root = _own_location(first)
    rivals = [detail for detail in details if _own_location(detail)[: len(root)] == root]
    meant = max(rivals, key=lambda detail: (len(_own_location(detail)), not detail["type"].endswith("_type")))
    return _describe_one(kind, first if first["type"] in ("extra_forbidden", "none_required") else meant)


def _own_location(detail: ErrorDetails) -> list[int | str]:
    """Pydantic puts the names of a union's branches into the path; people know only their own fields."""
    return [part for part in detail["loc"] if not _is_branch(part)]


def _describe_one(kind: type[BaseModel], detail: ErrorDetails) -> ApiError:
    location = _own_location(detail)
    param = _path(location)
    match detail["type"]:
        case "json_invalid":
            return invalid(f"The body is not JSON: {detail['ctx']['error']}.", code="invalid_json")
        case "model_type" | "model_attributes_type" if not location:
            return invalid("The body is JSON, but not an object. Send {...}.", code="invalid_type")
        case "extra_forbidden":
            return invalid(_unknown_field(kind, location), param=param, code="unknown_parameter")
        case "none_required":
            reason = _refusal(kind, location)
            return invalid(f"'{param}' is not supported. {reason}", param=param, code="unsupported_parameter")
        case "missing":
            return invalid(f"'{param}' is missing.", param=param, code="missing_required_parameter")
        case "value_error":
            cause = detail["ctx"]["error"]
            if isinstance(cause, FieldError):
                return invalid(str(cause), param=cause.param, code=cause.code)
            return invalid(f"'{param}': {cause}" if param else str(cause), param=param or None, code="invalid_value")
    code = "invalid_type" if detail["type"].endswith(("_type", "_parsing")) else "invalid_value"
    shown = repr(detail["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return invalid(f"'{param}' is wrong: {_lower(detail['msg'])}, but it is {shown}.", param=param, code=code)


class FieldError(ValueError):
    """A field that is well-formed and still cannot be served; raised by validators."""

    def __init__(self, message: str, *, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def nearest(name: str, valid: list[str]) -> str | None:
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _unknown_field(kind: type[BaseModel], location: list[int | str]) -> str:
    name = str(location[-1])
    fields = _fields_at(kind, location[:-1])
    guess = nearest(name, fields)
    hint = f" Did you mean '{guess}'?" if guess else (f" Known are: {', '.join(sorted(fields))}." if fields else "")
    return f"'{_path(location)}' is not a known field.{hint}"


def _refusal(kind: type[BaseModel], location: list[int | str]) -> str:
    owner = _model_at(kind, location[:-1])
    return getattr(owner, "REFUSED", {}).get(str(location[-1]), "Leave it out.")


def _fields_at(kind: type[BaseModel], location: list[int | str]) -> list[str]:
    owner = _model_at(kind, location)
    if owner is None:
        return []
    refused = getattr(owner, "REFUSED", {})
    return [field.alias or name for name, field in owner.model_fields.items() if name not in refused]


def _model_at(kind: type[BaseModel], location: list[int | str]) -> type[BaseModel] | None:
    """The record type that lies at a path of field names and list positions."""
    for part in location:
        if isinstance(part, int):
            continue
        field = next((field for name, field in kind.model_fields.items() if part in (name, field.alias)), None)
        inner = _first_model(field.annotation) if field else None
        if inner is None:
            return None
        kind = inner
    return kind


def _first_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in typing.get_args(annotation) if (found := _first_model(part))), None)


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and (part in _BRANCHES or part[:1].isupper() or any(sign in part for sign in "[(-"))


_BRANCHES = {"str", "int", "float", "bool"}


def _path(location: list[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else part)
    return path


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
