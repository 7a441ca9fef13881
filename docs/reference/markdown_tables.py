"""Tables of options and keys in Markdown."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def type_name(annotation: Any) -> str:
    """Return the short name of a type: literals as their values, unions with `or`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, arguments))
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"map of {type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "bool": "true or false", "int": "integer", "float": "number", "Path": "path"}.get(
        annotation.__name__, annotation.__name__
    )


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells] + [""]


def format_default(value: Any) -> str:
    """Return a default value as code; a dash for none."""
    if value is None or value in ([], ""):
        return "–"
    value = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
