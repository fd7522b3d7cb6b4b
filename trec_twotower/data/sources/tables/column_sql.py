"""SQL expressions that parse text as numbers, times and booleans."""

from __future__ import annotations

from trec_twotower.data.sources.tables.event_files import sql_text

INTEGERS = {sign + kind for sign in ("", "U") for kind in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")}
WIDE_INTEGERS = {"UBIGINT", "HUGEINT", "UHUGEINT"}  # may hold more than int64
FLOATS = {"FLOAT", "DOUBLE"}
EXACT = 2**53  # integers up to here are exact in a DOUBLE
NULL_WORDS = ("NULL", "null", "NaN", "nan", "NA", "N/A", "n/a", "None", "none", r"\N", "-", "?", "inf", "-inf", "Inf")

# Parts of numbers, as regular expressions.
NUMBER = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
WHOLE_FLOAT = r"(0|-?[1-9][0-9]{0,15})\.0"  # as pandas writes integers in a column with nulls
FRACTION = r"-?(0|[1-9][0-9]*)\.[0-9]*[1-9]"
DECIMALS = r"-?(0|[1-9][0-9]*)\.[0-9]+"
COMMA_NUMBER = r"[-+]?[0-9]+,[0-9]+"
ISO_TIME = (
    r"[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}([ T][0-9]{1,2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?"
    r"( ?(Z|UTC|[-+][0-9]{2}(:?[0-9]{2})?))?)?"
)


def is_number_type(kind: str) -> bool:
    return kind in INTEGERS | WIDE_INTEGERS | FLOATS or (kind.startswith("DECIMAL") and not kind.endswith("]"))


def is_time_type(kind: str) -> bool:
    return kind == "DATE" or (kind.startswith("TIMESTAMP") and not kind.endswith("]"))


def number_of(text: str, decimal: str) -> str:
    """Return SQL that parses text as a DOUBLE, ignoring surrounding blanks; NULL if it is no number."""
    text = f"trim({text})" if decimal == "." else f"replace(replace(trim({text}), '.', 'x'), ',', '.')"
    return f"CASE WHEN regexp_full_match({text}, {sql_text(NUMBER)}) THEN try_cast({text} AS DOUBLE) END"


def integer_of(text: str) -> str:
    """Return SQL that parses text as a BIGINT, also 007 or 7.0; NULL if it is no integer."""
    digits = f"regexp_replace(trim({text}), '\\.0*$', '')"
    return f"CASE WHEN regexp_full_match({digits}, '[-+]?[0-9]+') THEN try_cast({digits} AS BIGINT) END"


def boolean_of(text: str) -> str:
    word = f"lower(trim({text}))"
    return (
        f"CASE WHEN {word} IN ('true', 't', 'yes', 'y', '1') THEN true "
        f"WHEN {word} IN ('false', 'f', 'no', 'n', '0') THEN false END"
    )


def time_of(text: str, format: str | None) -> str:
    """Return SQL that parses text as a time, in ISO 8601 or `format`. A time without a zone is UTC."""
    if format is not None:
        return f"try_strptime({text}, {sql_text(format)})"
    return f"CASE WHEN regexp_full_match({text}, {sql_text(ISO_TIME)}) THEN try_cast({text} AS TIMESTAMPTZ) END"


def text_of(name: str, kind: str) -> str:
    """Return SQL that converts any type to text; whole floats lose their decimal point."""
    if kind in FLOATS:
        return (
            f"CASE WHEN {name} = trunc({name}) AND abs({name}) <= {EXACT} THEN CAST(CAST({name} AS BIGINT) AS VARCHAR) "
            f"ELSE CAST({name} AS VARCHAR) END"
        )
    return f"try(decode({name}))" if kind == "BLOB" else f"CAST({name} AS VARCHAR)"


def is_integer(text: str) -> str:
    """Return SQL for whether a text is the canonical spelling of an int64."""
    return f"coalesce(CAST(try_cast({text} AS BIGINT) AS VARCHAR) = {text}, false)"


def as_text(name: str, kind: str) -> str:
    return name if kind == "VARCHAR" else f"CAST({name} AS VARCHAR)"
