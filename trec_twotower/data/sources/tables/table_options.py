"""Options of `prepare events` that describe the files: format, separators, encodings and types."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal, TypeVar

import duckdb
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from trec_twotower.data.sources.event_logs.log_options import LogOptions

TableName = Literal["events", "items", "users"]
TABLES: tuple[TableName, ...] = ("events", "items", "users")
TYPES = ("text", "integer", "number", "boolean", "time")
TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # units per second

_SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " ", r"\t": "\t"}
_UTF_8 = {"utf-8", "utf-8-sig", "ascii"}

Value = TypeVar("Value")


def _for_every_table(value: Any) -> Any:
    """Expand one value to events, items and users; a mapping names its tables explicitly."""
    if value is None:
        return {}
    return value if isinstance(value, dict) else dict.fromkeys(TABLES, value)


def _for_events(value: Any) -> Any:
    """Apply a plain list to the events only, because tables rarely share their columns."""
    return {"events": value} if isinstance(value, list | tuple) else _for_every_table(value)


def _separator(value: str) -> str:
    value = _SEPARATORS.get(value, value)
    if not 1 <= len(value.encode()) <= 4 or "\n" in value or "\r" in value:
        raise ValueError("a separator is 1 to 4 bytes long, such as ',', '::' or tab")
    return value


def _quote(value: str) -> str:
    if value in ("none", ""):
        return ""
    if len(value.encode()) != 1:
        raise ValueError("a quote is one character, or none")
    return value


def _encoding(value: str) -> str:
    """Return Python's name of the codec; utf-8 for its subsets."""
    try:
        name = codecs.lookup(value).name
    except LookupError:
        raise ValueError(
            "there is no such encoding; known are utf-8, latin-1, cp1252, utf-16 and Python's others"
        ) from None
    return "utf-8" if name in _UTF_8 else "latin-1" if name == "iso8859-1" else name


def _null_words(value: Any) -> Any:
    """Return the null words as text. YAML parses NULL and null as null, so null means both."""
    words = [] if value == () else value if isinstance(value, list | tuple) else [value]
    spelled: list[str] = []
    for word in words:
        spelled += ["NULL", "null"] if word is None else [str(word)]
    return tuple(dict.fromkeys(spelled))


def _decimal(value: Any) -> Any:
    return {"comma": ",", "point": "."}.get(value, value)


def is_time_format(value: str) -> bool:
    """Return whether a type is a strptime format rather than a type name."""
    return "%" in value


def check_time_format(value: str) -> str:
    if not is_time_format(value):
        raise ValueError("a time format has parts such as %d/%m/%Y %H:%M:%S (as strptime)")
    try:
        duckdb.execute("SELECT try_strptime('', ?)", [value]).fetchall()
    except duckdb.Error as error:
        raise ValueError(f"not a time format: {str(error).splitlines()[0]}") from None
    return value


def _type(value: str) -> str:
    if is_time_format(value):
        return check_time_format(value)
    if value not in TYPES:
        raise ValueError(f"a type is {', '.join(TYPES)} or a time format such as %d/%m/%Y")
    return value


Separator = Annotated[str, AfterValidator(_separator)]
ForEveryTable = BeforeValidator(_for_every_table)


class TableOptions(LogOptions):
    """Format of the files of each table.

    Options of type "per table" are one value for all tables, or a mapping such as {events: "::", items: ","}.
    """

    verbatim = frozenset({"where", "time_format", "separator", "quote", "decimal", "types", "lists"})

    format: Annotated[dict[TableName, Literal["parquet", "csv", "json"]], ForEveryTable] = Field(
        default_factory=dict, description="parquet, csv or json; per table; without it, by the ending of the name"
    )
    separator: Annotated[dict[TableName, Separator], ForEveryTable] = Field(
        default_factory=dict,
        description="what separates the columns of CSV: 1 to 4 bytes, or tab, comma, semicolon, pipe, space; "
        "per table; without it, by the first line",
    )
    quote: Annotated[dict[TableName, Annotated[str, AfterValidator(_quote)]], ForEveryTable] = Field(
        default_factory=dict, description="the quoting character of CSV, or none; per table; without it, a double quote"
    )
    header: Annotated[dict[TableName, bool], ForEveryTable] = Field(
        default_factory=dict,
        description="whether the first line of CSV holds the names; per table; without it, true unless columns is set",
    )
    columns: Annotated[dict[TableName, tuple[str, ...]], BeforeValidator(_for_events)] = Field(
        default_factory=dict, description="names of the columns of CSV files without names; per table"
    )
    encoding: Annotated[dict[TableName, Annotated[str, AfterValidator(_encoding)]], ForEveryTable] = Field(
        default_factory=dict,
        description="encoding of CSV and JSON, such as latin-1, cp1252 or utf-16; per table; without it, utf-8",
    )
    null: Annotated[tuple[str, ...], BeforeValidator(_null_words)] = Field(
        (), description="words of CSV that mean null, in addition to empty cells"
    )
    decimal: Annotated[Literal[".", ","], BeforeValidator(_decimal)] = Field(
        ".", description="decimal sign of numbers in text: point or comma"
    )
    types: dict[str, Annotated[str, AfterValidator(_type)]] = Field(
        default_factory=dict,
        description="types of columns: text, integer, number, boolean, time or a time format, as types.zip=text; "
        "without it, by all rows",
    )
    lists: dict[str, Separator] = Field(
        default_factory=dict, description="text columns that are lists, with their separators, as lists.genres=pipe"
    )
    time_format: Annotated[str, AfterValidator(check_time_format)] | None = Field(
        None, description="form of times in text, as %d/%m/%Y %H:%M"
    )
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(
        None, description="unit of times that are numbers; without it, by all rows"
    )
    where: str | None = Field(
        None,
        min_length=1,
        description="SQL condition on the columns of the events, such as click = 1; other rows are left out",
    )

    def named_columns(self, table: TableName) -> list[str]:
        """Return the columns that the options name for this table."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _files_fit(self) -> TableOptions:
        if self.time_format and self.time_unit:
            raise ValueError("time_format is for text and time_unit for numbers: give one of them")
        for table, columns in self.columns.items():
            if len({name.casefold() for name in columns}) < len(columns):
                raise ValueError(f"columns of {table}: a name is given twice (case is ignored)")
            if self.format.get(table, "csv") != "csv":
                raise ValueError(f"columns of {table}: only CSV files have no names of their own")
        return self
