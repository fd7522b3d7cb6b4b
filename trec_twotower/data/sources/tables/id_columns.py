"""Id columns: integers if every id of all tables is one, else text, so that distinct ids stay distinct."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from trec_twotower.data.sources.tables.column_sql import (
    EXACT,
    FLOATS,
    INTEGERS,
    WHOLE_FLOAT,
    WIDE_INTEGERS,
    is_integer,
    is_number_type,
)
from trec_twotower.data.sources.tables.event_files import sql_name, sql_text
from trec_twotower.data.sources.tables.table_columns import Column, DeclaredColumn, Rows, Typed, as_kind, note
from trec_twotower.errors import ConfigError, DataError

_RANGES = {"BIGINT": (-(2**63), 2**63 - 1), "UBIGINT": (0, 2**64 - 1)}
_EVERY = frozenset(_RANGES)


def id_column(column: Column) -> Column:
    """Return the column as the subclass that types its ids. Raise DataError if ids cannot have its type."""
    name, kind = column.name, column.kind
    if name in column.options.types:
        return as_kind(column, DeclaredIds)
    if kind in INTEGERS | WIDE_INTEGERS:
        return as_kind(column, IntegerIds)
    if kind in ("VARCHAR", "UUID"):
        return as_kind(column, UndeclaredIds if column.is_undeclared else TextIds)
    if is_number_type(kind):
        return as_kind(column, FloatIds)
    raise column.refusal(f"ids are whole numbers or text: cast it, or set types.{name}=text")


class DeclaredIds(DeclaredColumn):
    """Ids of the type that the option `types` declares."""

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        if self.type not in ("text", "integer"):
            raise ConfigError(f"types.{self.name}={self.type}: this column holds ids, which are text or integer.")
        typed = super().typed(found, rows)
        if self.type == "text":
            return Typed(typed.type, typed.expression, is_declared=True)
        return Typed("BIGINT", f"CAST({typed.expression} AS BIGINT)", fits=frozenset({"BIGINT"}), is_declared=True)


class TextIds(Column):
    """Ids that the files declare as text."""

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        return Typed("VARCHAR", f"CAST({self.sql} AS VARCHAR)", is_declared=True)


class IntegerIds(Column):
    """Ids that the files declare as integers; ids of 2^63 or more stay unsigned."""

    def aggregates(self) -> dict[str, str]:
        return {"least": f"min({self.sql})", "most": f"max({self.sql})"} if self.kind in WIDE_INTEGERS else {}

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        fits = frozenset({"BIGINT"})
        if found.get("least") is not None:
            least, most = int(found["least"]), int(found["most"])
            fits = frozenset(kind for kind, (low, high) in _RANGES.items() if low <= least and most <= high)
        if not fits:
            raise self.refusal("no integer type of 64 bits holds all of its ids: write them as text")
        kind = "BIGINT" if "BIGINT" in fits else "UBIGINT"
        return Typed(kind, f"CAST({self.sql} AS {kind})", fits=fits, is_declared=True)


class FloatIds(Column):
    """Ids stored as floats, as pandas does in a column with nulls: read as integers if whole, else an error."""

    @property
    def _is_whole(self) -> str:
        limit = f" AND abs({self.sql}) <= {EXACT}" if self.kind in FLOATS else ""
        return f"coalesce(try_cast({self.sql} AS BIGINT) = {self.sql}, false){limit}"

    def aggregates(self) -> dict[str, str]:
        present = f"{self.sql} IS NOT NULL" + (f" AND NOT isnan({self.sql})" if self.kind in FLOATS else "")
        return {
            "odd_count": f"count(*) FILTER ({present} AND NOT ({self._is_whole}))",
            "odd": f"CAST(min({self.sql}) FILTER ({present} AND NOT ({self._is_whole})) AS VARCHAR)",
        }

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        if found["odd_count"]:
            raise self.refusal(
                f"ids are whole numbers or text ({found['odd']} is neither, or too large to be exact): cast it, or set "
                f"types.{self.name}=text"
            )
        note(f"{self.where}: the ids of {self.name!r} are {self.kind}, and all of them are whole: read as integers.")
        return Typed("BIGINT", f"try_cast({self.sql} AS BIGINT)", fits=frozenset({"BIGINT"}), is_declared=True)


class UndeclaredIds(Column):
    """Ids in CSV, where no type is declared."""

    @property
    def spelling(self) -> str:
        text = self.sql
        unsigned = f"coalesce(CAST(try_cast({text} AS UBIGINT) AS VARCHAR) = {text}, false)"
        return (
            f"CASE WHEN {is_integer(text)} THEN CASE WHEN starts_with({text}, '-') THEN 'negative' ELSE 'integer' END "
            f"WHEN {unsigned} THEN 'unsigned' WHEN regexp_full_match({text}, {sql_text(WHOLE_FLOAT)}) THEN 'whole' "
            f"WHEN {text} IS NOT NULL THEN 'text' END"
        )

    def aggregates(self) -> dict[str, str]:
        return {
            "spellings": f"histogram({self.spelling_name})",
            "odd": f"min({self.sql}) FILTER ({self.spelling_name} IN ('text', 'whole'))",
        }

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        spellings: dict[str, int] = found["spellings"] or {}
        kinds = set(spellings)
        holds = {"BIGINT": {"integer", "negative"}, "UBIGINT": {"integer", "unsigned"}}
        fits = frozenset(kind for kind, spelled in holds.items() if kinds <= spelled)
        if fits:
            kind = "BIGINT" if "BIGINT" in fits else "UBIGINT"
            return Typed(kind, f"CAST({self.sql} AS {kind})", fits=fits)
        named = f"{self.where}: the ids of {self.name!r}"
        integers = sum(spellings.get(kind, 0) for kind in ("integer", "negative", "unsigned"))
        if kinds == {"whole"}:
            note(
                f"{named} are all written as floats, such as {found['odd']}: read as integers. "
                f"types.{self.name}=text keeps them as they are written."
            )
            return Typed("BIGINT", f"CAST(replace({self.sql}, '.0', '') AS BIGINT)", fits=frozenset({"BIGINT"}))
        if "whole" in kinds and "text" not in kinds:
            raise DataError(
                f"{named} are written as floats in {spellings['whole']:,} rows (such as {found['odd']}) and as "
                f"integers in {integers:,}: types.{self.name}=integer reads both as integers, "
                f"types.{self.name}=text keeps them apart."
            )
        if integers:
            values = sum(spellings.values())
            such = f", such as {found['odd']}" if found["odd"] else ""
            note(
                f"{named} are read as text, because {values - integers:,} of {values:,} are no plain integers{such}."
                if values > integers
                else f"{named} are read as text, because no integer type of 64 bits holds all of them."
            )
        return Typed("VARCHAR", self.sql)


def joint_id_type(ids: Sequence[tuple[str, str, Typed]]) -> str:
    """Return the joint DuckDB type of the (place, column, type) ids of several tables: text unless all are integers.

    Raises DataError where one table declares integers and another text.
    """
    fits = _EVERY.intersection(*(typed.fits for _, _, typed in ids))
    if fits:
        return "BIGINT" if "BIGINT" in fits else "UBIGINT"
    declared = [(where, column, typed.type) for where, column, typed in ids if typed.is_declared]
    for (first_where, _, first), (where, column, kind) in itertools.pairwise(declared):
        if kind != first:
            holder = "the events hold" if first_where.startswith("events = ") else f"{first_where} holds"
            raise DataError(
                f"{where}: {column!r} is {kind}, but {holder} {first}: write both with one type, or set "
                f"types.{column}=text."
            )
    if any(typed.type != "VARCHAR" for _, _, typed in ids):
        where, column, _ = next(each for each in ids if each[2].type == "VARCHAR")
        note(f"ids are text in all tables, because those of {column!r} in {where} are no plain integers.")
    return "VARCHAR"


def as_id(column: str, typed: Typed, kind: str) -> str:
    """Return the SQL expression that casts typed ids to the joint type."""
    return sql_name(column) if typed.type == kind else f"CAST({sql_name(column)} AS {kind})"
