"""Arithmetic for models, which are bad at it. An expression is evaluated by `simpleeval` with our own operators:
numbers only, no names, attributes, strings or loops, and every result is held small, so that none can take long."""

from __future__ import annotations

import math
import operator
import re
from ast import Add, Div, FloorDiv, Mod, Mult, Pow, Sub, UAdd, USub
from collections.abc import Callable
from typing import Any

from pydantic import Field
from simpleeval import InvalidExpression, SimpleEval

from services.tools.registry import Tool, ToolArguments, ToolContext, ToolError

MAX_LENGTH = 300
MAX_BITS = 2048
_DIGITS_SHOWN = 12

Number = int | float


class CalculatorArguments(ToolArguments):
    expression: str = Field(
        min_length=1,
        max_length=MAX_LENGTH,
        description="Arithmetic such as 12 * (3 + 4) or sqrt(2) / 3. Operators + - * / // % **, functions sqrt, abs, "
        "round, floor, ceil, min, max, exp, ln, log10, log2, sin, cos, tan; constants pi, e.",
    )


async def _run(arguments: CalculatorArguments, context: ToolContext) -> str:
    return calculate(arguments.expression)


CALCULATOR = Tool("calculator", "Computes an arithmetic expression exactly.", CalculatorArguments, _run)


def calculate(expression: str) -> str:
    """The value as text; `ToolError` says what is wrong with the expression."""
    if len(expression) > MAX_LENGTH:
        raise ToolError(f"The expression is longer than {MAX_LENGTH} characters; compute it in parts.")
    plain = _as_python(expression)
    evaluator = SimpleEval(operators=_OPERATORS, functions=_FUNCTIONS, names=_CONSTANTS)
    try:
        return _show(_small(evaluator.eval(plain)))
    except ToolError:
        raise
    except ZeroDivisionError:
        raise ToolError("Division by zero.") from None
    except OverflowError:
        raise ToolError("The result is too large.") from None
    except (InvalidExpression, SyntaxError, TypeError, ValueError, RecursionError, KeyError, AttributeError) as error:
        raise ToolError(
            f"Cannot compute {expression!r}: {error}. Write plain arithmetic such as 2 * (3 + 4)."
        ) from None


def _as_python(expression: str) -> str:
    """People and models write `×`, `÷`, `^`, `1,000` and `15%`; an `=` at the end is no part of it."""
    plain = expression.strip().rstrip("=").strip()
    for written, meant in (("×", "*"), ("·", "*"), ("÷", "/"), ("−", "-"), ("^", "**"), ("π", "pi")):
        plain = plain.replace(written, meant)
    if "(" not in plain or not re.search(r"\b(min|max|round)\b", plain):
        plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    return re.sub(r"(\d+(?:\.\d+)?)%(?=\s*(?:$|[-+*/),]))", r"(\1/100)", plain)


def _small(value: Any) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ToolError("The result is no number.")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ToolError("The result is too large.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("The result is not a finite number.")
    return value


def _power(base: Number, exponent: Number) -> Number:
    both_whole = isinstance(base, int) and isinstance(exponent, int)
    if both_whole and abs(base) > 1 and int(base).bit_length() * abs(exponent) > MAX_BITS:
        raise ToolError("The result is too large.")
    result = base**exponent
    if isinstance(result, complex):
        raise ToolError("The root of a negative number is not real.")
    return _small(result)


def _checked(function: Callable[..., Any]) -> Callable[..., Number]:
    return lambda *values: _small(function(*(_small(value) for value in values)))


def _round(value: Number, digits: int = 0) -> Number:
    return round(value, max(-50, min(50, digits))) if digits else round(value)


_OPERATORS: dict[Any, Callable[..., Number]] = {
    Add: _checked(operator.add),
    Sub: _checked(operator.sub),
    Mult: _checked(operator.mul),
    Div: _checked(operator.truediv),
    FloorDiv: _checked(operator.floordiv),
    Mod: _checked(operator.mod),
    Pow: _power,
    UAdd: _checked(operator.pos),
    USub: _checked(operator.neg),
}
_RAW_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": math.sqrt,
    "abs": abs,
    "round": _round,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
    "exp": math.exp,
    "ln": math.log,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
_FUNCTIONS = {name: _checked(function) for name, function in _RAW_FUNCTIONS.items()}
_CONSTANTS = {"pi": math.pi, "e": math.e}


def _show(value: Number) -> str:
    if isinstance(value, int):
        return str(value)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.{_DIGITS_SHOWN}g}"
