"""Infer the type of each column of a table from a scan of all its rows.

The types that Parquet and JSON declare are kept. CSV declares none: a column has the type that fits all its values.

    integer   every value is spelled as an int64 is: no leading zero, plus sign, blank, hexadecimal or decimal point
    number    every value is a decimal number, and no two spellings are of one number (1.10 and 1.1 together are text)
    text      else; ids are integers or text, never numbers

So distinct values stay distinct in all rows. The option `types` overrides the inferred type.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trec_twotower.data.sources.tables.column_sql import (
    COMMA_NUMBER,
    DECIMALS,
    FLOATS,
    FRACTION,
    INTEGERS,
    NULL_WORDS,
    NUMBER,
    WHOLE_FLOAT,
    WIDE_INTEGERS,
    as_text,
    boolean_of,
    integer_of,
    is_integer,
    is_number_type,
    is_time_type,
    number_of,
    text_of,
    time_of,
)
from trec_twotower.data.sources.tables.event_files import sql_name, sql_text
from trec_twotower.data.sources.tables.table_options import TableOptions, is_time_format
from trec_twotower.errors import ConfigError, DataError, nearest

# Types that models do not read; `_readable` replaces them. Quoted field names are unchanged.
_ODD_TYPES = re.compile(r'"NULL"(?=[\[\],)]|$)|("(?:[^"]|"")*")|\b(?:DECIMAL\(\d+,\d+\)|U?HUGEINT|UUID)(?=[\[\],)]|$)')


def note(message: str) -> None:
    """Print how something was read that could have been read in another way."""
    print(f"note: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Rows:
    """Access to all rows: `count` returns how many meet an SQL condition, `refuse` the error naming the first.

    `refuse` gets a column, the condition, the number of rows that meet it, and the reason.
    """

    count: Callable[[str], int]
    refuse: Callable[[str, str, int, str], DataError]


@dataclass(frozen=True)
class Typed:
    """Type of a column, and the SQL expression that converts to it.

    `microseconds` is the SQL expression of a typed time in whole microseconds since 1970.
    """

    type: str
    expression: str
    microseconds: str = ""
    fits: frozenset[str] = frozenset()  # for ids: the integer types that can hold all of them
    is_declared: bool = False  # for ids: whether the files or the option `types` declare the type


@dataclass(frozen=True)
class Column:
    """Column of the files: `kind` is its DuckDB type there, `where` names the files.

    A subclass determines the final type: `aggregates` are the statistics it needs of all rows, `typed` decides.
    """

    name: str
    kind: str
    where: str
    options: TableOptions
    role: str = "column"  # name of the option that selects the column
    is_undeclared: bool = False

    @property
    def sql(self) -> str:
        """Return the SQL expression of the column, with null words replaced by NULL."""
        name = sql_name(self.name)
        if self.kind != "VARCHAR" or not self.options.null:
            return name
        words = ", ".join(map(sql_text, self.options.null))
        return f"CASE WHEN {name} NOT IN ({words}) THEN {name} END"

    @property
    def spelling(self) -> str | None:
        """Return SQL for the spelling of a value as a single string; None if the type does not depend on it."""
        return None

    @property
    def spelling_name(self) -> str:
        """Return the SQL name of `spelling`, which DuckDB computes once for all `aggregates`."""
        return sql_name(f"spelling of {self.name}")

    def aggregates(self) -> dict[str, str]:
        """Return SQL aggregates over all rows, keyed by their name in the `found` argument of `typed`."""
        return {}

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        """Return the column's type. Raise DataError if no type fits its values."""
        raise NotImplementedError

    def refusal(self, why: str) -> DataError:
        return DataError(f"{self.where}: column {self.name!r} is {self.kind}, but {why}.")


class PlainColumn(Column):
    """Column that keeps its declared type, except for types that models do not read."""

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        kind = _ODD_TYPES.sub(_readable, self.kind)
        return Typed(kind, self.sql if kind == self.kind else f"CAST({self.sql} AS {kind})")


def _readable(found: re.Match[str]) -> str:
    if found[1]:
        return found[1]
    return "DOUBLE" if found[0].startswith(("DECIMAL", "HUGE", "UHUGE")) else "VARCHAR"


class DeclaredColumn(Column):
    """Column whose type is declared by the option `types`, or by its use as weight or rating."""

    declared: ClassVar[str | None] = None

    @property
    def type(self) -> str:
        return self.declared or self.options.types[self.name]

    def _value(self) -> tuple[str, str]:
        """Return the DuckDB type and the SQL expression, which is NULL for values of another type."""
        name, kind, type = self.sql, self.kind, self.type
        if type == "text":
            return "VARCHAR", name if kind == "VARCHAR" else text_of(name, kind)
        if type == "time" or is_time_format(type):
            if is_time_type(kind):
                return kind, name
            if kind == "VARCHAR" or (is_time_format(type) and kind in INTEGERS):
                return (
                    "TIMESTAMP",
                    f"CAST({time_of(as_text(name, kind), None if type == 'time' else type)} AS TIMESTAMP)",
                )
        if type == "number":
            if is_number_type(kind) or kind == "BOOLEAN":
                return "DOUBLE", f"CAST({name} AS DOUBLE)"
            if kind == "VARCHAR":
                return "DOUBLE", number_of(name, self.options.decimal)
        if type == "integer":
            if kind in INTEGERS - WIDE_INTEGERS:
                return kind, name
            if is_number_type(kind) or kind == "BOOLEAN":
                return "BIGINT", f"CASE WHEN {name} = try_cast({name} AS BIGINT) THEN try_cast({name} AS BIGINT) END"
            if kind == "VARCHAR":
                return "BIGINT", integer_of(name)
        if type == "boolean":
            if kind == "BOOLEAN":
                return kind, name
            if kind == "VARCHAR" or kind in INTEGERS:
                return "BOOLEAN", boolean_of(as_text(name, kind))
        raise self.refusal(f"{self._source}, which cannot be read from that type")

    @property
    def _source(self) -> str:
        return f"a {self.role} is a number" if self.declared else f"types.{self.name}={self.type} is asked for"

    def aggregates(self) -> dict[str, str]:
        return {"bad": f"count(*) FILTER ({self._is_bad})"}

    @property
    def _is_bad(self) -> str:
        return f"{self._present} AND ({self._value()[1]}) IS NULL"

    @property
    def _present(self) -> str:
        return f"({self.sql}) IS NOT NULL" + (f" AND NOT isnan({self.sql})" if self.kind in FLOATS else "")

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        if found["bad"]:
            comma = ", or decimal=comma if its comma is a decimal point" if self.type == "number" else ""
            why = f"{self._source}, and this is none: fix it, or set null=WORD if it means a missing value{comma}"
            raise rows.refuse(self.name, self._is_bad, found["bad"], why)
        return Typed(*self._value())


class NumberColumn(DeclaredColumn):
    """Weight or rating of events."""

    declared = "number"


class FeatureColumn(Column):
    """CSV column: integers, numbers or text, inferred from all values."""

    is_noted: ClassVar[bool] = True

    @property
    def spelling(self) -> str:
        """Return SQL for the spelling class; for decimals it includes the number of places."""
        text = self.sql
        places = f"(length({text}) - strpos({text}, '.'))"
        shortest = f"contains({text}, 'e') AND CAST(try_cast({text} AS DOUBLE) AS VARCHAR) = {text}"
        spellings = {
            is_integer(text): "'integer'",
            _matches(text, WHOLE_FLOAT): "'whole'",
            f"length({text}) <= 17 AND {_matches(text, FRACTION)}": f"concat('fraction ', {places})",
            f"length({text}) <= 17 AND {_matches(text, DECIMALS)}": f"concat('padded ', {places})",
            f"length({text}) = 18 AND {_matches(text, FRACTION)}": "'fraction'",
            shortest: "'fraction'",
            _matches(f"trim({text})", NUMBER): "'number'",
            _matches(f"trim({text})", COMMA_NUMBER): "'comma'",
            "true": "'text'",
        }
        numbers = f"CASE {' '.join(f'WHEN {condition} THEN {word}' for condition, word in spellings.items())} END"
        words = ", ".join(map(sql_text, NULL_WORDS))
        return (
            f"CASE WHEN regexp_matches({text}, '^\\s*[-+]?\\.?[0-9]') THEN {numbers} "
            f"WHEN {text} IN ({words}) THEN 'null' WHEN {text} IS NOT NULL THEN 'text' END"
        )

    def aggregates(self) -> dict[str, str]:
        return {
            "spellings": f"histogram({self.spelling_name})",
            "odd": f"min({self.sql}) FILTER ({self.spelling_name} IN ('comma', 'null', 'text'))",
        }

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        spellings: dict[str, int] = found["spellings"] or {}
        kinds = {word.split(" ")[0] for word in spellings}
        if not kinds:
            return Typed("VARCHAR", self.sql)
        if kinds == {"integer"}:
            return Typed("BIGINT", f"CAST({self.sql} AS BIGINT)")
        # No two texts may be one number: all have the same number of decimals, or none has a trailing zero.
        places = {
            word.replace("whole", "padded 1").removeprefix("padded").removeprefix("fraction") for word in spellings
        }
        has_equal_places = kinds <= {"whole", "fraction", "padded"} and len(places) == 1 and places != {""}
        if has_equal_places or kinds in ({"fraction"}, {"integer", "fraction"}, {"whole"}, {"whole", "fraction"}):
            return Typed("DOUBLE", f"CAST({self.sql} AS DOUBLE)")
        if self.is_noted:
            self._note(kinds, found["odd"], spellings)
        return Typed("VARCHAR", self.sql)

    def _note(self, kinds: set[str], odd: str, spellings: dict[str, int]) -> None:
        """Report a column of numbers that is read as text."""
        named = f"{self.where}: column {self.name!r}"
        others = kinds - {"integer", "whole", "fraction", "padded", "number"}
        if not others:
            note(
                f"{named} spells numbers in several ways (such as 1.10 and 1.1, 007 or 1E5), so that it is read as "
                f"text: types.{self.name}=number reads numbers."
            )
        elif others == {"null"} and others != kinds:
            note(
                f"{named} is read as text, because {spellings['null']:,} of its values are no numbers, such as "
                f"{odd!r}: null={odd!r} reads that word as null."
            )
        elif others == {"comma"}:
            note(
                f"{named} is read as text, because of commas such as in {odd!r}: types.{self.name}=number with "
                "decimal=comma reads numbers."
            )


def _matches(text: str, pattern: str) -> str:
    return f"regexp_full_match({text}, {sql_text(pattern)})"


class FilterColumn(FeatureColumn):
    """CSV column that is used only by the condition `where`."""

    is_noted = False


class OrderColumn(FeatureColumn):
    """Column that orders events of equal time. CSV text prints a note, because "10" sorts before "9"."""

    is_noted = False

    @property
    def spelling(self) -> str:
        return super().spelling if self.is_undeclared else "NULL"

    def aggregates(self) -> dict[str, str]:
        return super().aggregates() if self.is_undeclared else {}

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        if not self.is_undeclared:
            return Typed(self.kind, self.sql)
        typed = super().typed(found, rows)
        if typed.type == "VARCHAR":
            note(f"{self.where}: {self.name!r} is text, and orders events character by character: types= changes this.")
        return typed


class ListColumn(Column):
    """Text that the option `lists` splits at separators: a list of integers if all values are, else of text."""

    @property
    def _parts(self) -> str:
        separator = self.options.lists[self.name]
        return f"list_filter(string_split({self.sql}, {sql_text(separator)}), lambda part: part <> '')"

    def aggregates(self) -> dict[str, str]:
        if self.kind != "VARCHAR":
            raise self.refusal(f"lists.{self.name}={self.options.lists[self.name]} separates text: leave it out")
        has_text = f"len(list_filter({self._parts}, lambda part: NOT {is_integer('part')})) > 0"
        return {"texts": f"count(*) FILTER ({has_text})", "parts": f"sum(len({self._parts}))"}

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        if found["texts"] or not found["parts"] or self.options.types.get(self.name) == "text":
            return Typed("VARCHAR[]", self._parts)
        return Typed("BIGINT[]", f"CAST({self._parts} AS BIGINT[])")


def feature_column(column: Column, *, is_noted: bool = True) -> Column:
    """Return the column as the subclass that types a feature, or a column used only by `where`."""
    name, options = column.name, column.options
    kind: type[Column] = PlainColumn
    if name in options.lists:
        kind = ListColumn
    elif name in options.types:
        kind = DeclaredColumn
    elif column.is_undeclared:
        kind = FeatureColumn if is_noted else FilterColumn
    return as_kind(column, kind)


def order_column(column: Column) -> Column:
    """Return the column as the subclass that types an order. Raise DataError if its type has no order."""
    if column.kind.endswith("]") or column.kind.startswith(("STRUCT", "MAP", "UNION", "JSON", "BLOB", "BIT")):
        raise column.refusal("an order is given by numbers, text or times: cast it")
    return feature_column(column) if column.name in column.options.types else as_kind(column, OrderColumn)


def as_kind(column: Column, kind: type[Column]) -> Column:
    return kind(column.name, column.kind, column.where, column.options, column.role, column.is_undeclared)


def check_names(options: TableOptions, known: Sequence[str]) -> None:
    """Raise ConfigError if `types` or `lists` name a column that no file has."""
    for option in ("types", "lists"):
        for name in getattr(options, option):
            if name not in known:
                raise ConfigError(f"{option} names a column {name!r}, which no file has{nearest(name, known)}.")
