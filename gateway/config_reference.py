"""The configuration's reference as a Markdown table, made from the settings themselves, so that it cannot be out of date."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gateway.config import SECRETS
from gateway.settings import Settings

KINDS: dict[Any, str] = {str: "text", int: "integer", bool: "true or false", float: "number", Path: "path"}


def markdown() -> str:
    """Every setting with its type, default and meaning."""
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    rows += [f"| `{path}` | {kind} | {default} | {meaning} |" for path, kind, default, meaning in _rows(Settings, "")]
    return "\n".join(rows) + "\n"


def settings() -> list[dict[str, str]]:
    """The same for programs."""
    return [
        {"setting": path, "type": kind, "default": default.strip("`"), "meaning": meaning}
        for path, kind, default, meaning in _rows(Settings, "")
    ]


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        inner, suffix = _section(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{path}{suffix}.")
            continue
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        kind = "secret, environment only" if not prefix and name in SECRETS else _kind(field.annotation)
        yield path, kind, _default(field), meaning


def _section(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section behind an annotation, and how its path goes on: itself, ``[]`` of a list, ``.<name>`` of a table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list and _section(arguments[0])[0] is not None:
        return arguments[0], "[]"
    if typing.get_origin(annotation) is dict and _section(arguments[1])[0] is not None:
        return arguments[1], ".<name>"
    return None, ""


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(str(value) for value in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _kind(next(argument for argument in arguments if argument is not types.NoneType))
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"table of {_kind(arguments[1])}"
    return KINDS[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{', '.join(value) if isinstance(value, list) else value}`"
