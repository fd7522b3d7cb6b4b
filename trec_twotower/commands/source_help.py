"""`prepare SOURCE --help`: the options of a source with type, default and meaning."""

from __future__ import annotations

import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from trec_twotower.data.sources import Source
from trec_twotower.data.sources.event_logs.log_options import Moment
from trec_twotower.data.sources.options import SourceOptions
from trec_twotower.data.sources.tables.table_options import TableName

LINE_WIDTH = 110
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text"}


def source_help(source: Source) -> str:
    """Return the help of one source: its purpose and a line or more for each option, the required ones first."""
    options = source.options
    fields = sorted(options.model_fields.items(), key=lambda entry: not entry[1].is_required())
    rows = [(name, type_text(field.annotation), _default_text(field)) for name, field in fields]
    widths = [max(map(len, column)) for column in zip(*rows, ("option", "type", "default"), strict=True)]
    widths[1], widths[2] = min(widths[1], 26), min(widths[2], 22)
    lines = [
        f"usage: trec-twotower prepare {source.name} --out DATASET [--overwrite] [key=value ...]",
        "",
        f"{source.name}: {source.help}.",
        "",
        *_cells(("option", "type", "default"), "meaning", widths),
    ]
    for row in rows:
        lines += _cells(row, description(options, row[0]), widths)
    return "\n".join(lines)


def description(options: type[SourceOptions], name: str) -> str:
    """Return the meaning of an option: its own, or that of the base model whose default it replaces; "" if none."""
    for model in options.__mro__:
        field = getattr(model, "__pydantic_fields__", {}).get(name)
        if field is not None and field.description:
            return field.description
    return ""


def type_text(annotation: Any) -> str:
    """Return the type of an option for people, such as "number" or "event, both"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation == Moment:
        return "time"
    if origin is Literal:
        is_plain = all(str(each).replace("-", "").isalnum() for each in inner)
        return ", ".join(map(str, inner)) if is_plain else "text"
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(each) for each in inner if each is not type(None))
    if origin is tuple:
        return "list"
    if origin is dict:
        return type_text(inner[1]) if inner[0] == TableName else "mapping"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return type_text(inner[0])
    return NAMES.get(annotation, "path")


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cells(row: tuple[str, ...], meaning: str, widths: list[int]) -> list[str]:
    """Return one row of the table; cells that are too long continue in further lines."""
    last = LINE_WIDTH - sum(widths) - 2 * len(widths) - 2
    columns = [textwrap.wrap(cell, width) or [""] for cell, width in zip((*row, meaning), (*widths, last), strict=True)]
    lines = []
    for number in range(max(map(len, columns))):
        cells = [column[number] if number < len(column) else "" for column in columns]
        lines.append("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, (*widths, last), strict=True)))
    return [line.rstrip() for line in lines]
