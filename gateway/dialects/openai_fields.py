"""Checks of single fields of an OpenAI-style body; every one ends in a value or in a 400 that names the field."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from gateway.api.errors import ApiError


def fail(param: str, code: str, problem: str) -> NoReturn:
    """Refuse the request: `problem` continues the sentence that begins with the field's name."""
    raise ApiError(400, code, f"`{param}` {problem}", param=param)


def wrong_type(param: str, value: object, wanted: str) -> NoReturn:
    """Refuse a missing value, or one of another type than `wanted`."""
    if value is None:
        fail(param, "missing_required_parameter", f"is required: {wanted}.")
    fail(param, "invalid_type", f"must be {wanted}, not {_kind(value)}.")


def text(value: object, param: str, wanted: str) -> str:
    """A required string; `wanted` says what it is for."""
    if not isinstance(value, str):
        wrong_type(param, value, wanted)
    return value


def optional_text(owner: dict[str, Any], name: str, param: str) -> str | None:
    """A string, or None where it is missing or null."""
    value = owner.get(name)
    return None if value is None else text(value, f"{param}.{name}", "a string")


def obj(value: object, param: str, wanted: str = "an object") -> dict[str, Any]:
    """A required object."""
    if not isinstance(value, dict):
        wrong_type(param, value, wanted)
    return value


def array(value: object, param: str, maximum: int, *, empty_allowed: bool = False) -> list[Any]:
    """A required array of at most `maximum` elements."""
    if not isinstance(value, list):
        wrong_type(param, value, "an array")
    if not value and not empty_allowed:
        fail(param, "empty_array", "must have at least one element.")
    if len(value) > maximum:
        fail(param, "array_above_max_length", f"has {len(value)} elements; at most {maximum} are accepted.")
    return value


def integer(owner: dict[str, Any], name: str, minimum: int, maximum: int) -> int | None:
    """A whole number within bounds, or None where it is missing or null."""
    value = owner.get(name)
    if value is None:
        return None
    if isinstance(value, float):
        fail(name, "invalid_type", f"must be a whole number, written as one, not {value!r}.")
    if type(value) is not int:  # a bool is an int to Python, not to a caller
        wrong_type(name, value, "a whole number")
    if not minimum <= value <= maximum:
        fail(name, "invalid_value", f"must be between {minimum} and {maximum}.")
    return value


def number(owner: dict[str, Any], name: str, minimum: int, maximum: int) -> float | None:
    """A number within bounds, or None where it is missing or null."""
    value = owner.get(name)
    if value is None:
        return None
    if type(value) not in (int, float):
        wrong_type(name, value, "a number")
    if not (math.isfinite(value) and minimum <= value <= maximum):
        fail(name, "invalid_value", f"must be between {minimum} and {maximum}.")
    return float(value)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"
