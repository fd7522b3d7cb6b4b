"""Time column: microseconds since 1970 from numbers of any unit, timestamps, or text in ISO 8601 or a format.

A day is never guessed from a month. Text such as 03/04/2024 is read if some value of all files shows which part is the
day (one above 12); else `time_format` must declare it. Numbers are in the unit that fits all values; else `time_unit`
must declare it.
"""

from __future__ import annotations

import re
from typing import Any

from trec_twotower.data.sources.tables.column_sql import (
    FLOATS,
    INTEGERS,
    NUMBER,
    WIDE_INTEGERS,
    as_text,
    is_integer,
    is_number_type,
    is_time_type,
    number_of,
    time_of,
)
from trec_twotower.data.sources.tables.event_files import LATEST_S, sql_name, sql_text, to_microseconds
from trec_twotower.data.sources.tables.table_columns import Column, Rows, Typed, note
from trec_twotower.data.sources.tables.table_options import TIME_UNITS, is_time_format
from trec_twotower.errors import ConfigError, DataError

_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Range of the years 1973 to 2286 in each unit. The ranges do not overlap.
_RANGES = {unit: (10**8 * per_second, 10**10 * per_second) for unit, per_second in TIME_UNITS.items()}
_DATED = r"[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{4}( [0-9]{1,2}:[0-9]{2}(:[0-9]{2})?( ?[AaPp][Mm])?)?"
_ZONE = r".*:[0-9]{2}.*(Z|UTC|[-+][0-9:]+)"
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", " %I:%M%p", " %I:%M:%S%p")


class TimeColumn(Column):
    """Column that the option `timestamp` names."""

    @property
    def _format(self) -> str | None:
        declared = self.options.types.get(self.name, "time")
        if is_time_format(declared):
            return declared
        if declared != "time":
            raise ConfigError(f"types.{self.name}={declared}: this column holds times, which are time or a format.")
        return self.options.time_format

    def aggregates(self) -> dict[str, str]:
        text = as_text(self.sql, self.kind)
        if self._format is not None:
            if not (self.kind == "VARCHAR" or self.kind in INTEGERS):
                raise self.refusal("time_format reads text: leave it out")
            return {"bad": f"count(*) FILTER ({self._unread(time_of(text, self._format))})"}
        if self.kind == "VARCHAR":
            return self._of_text()
        if is_number_type(self.kind):
            return self._of_numbers(self._number)
        if is_time_type(self.kind) and self.options.time_unit is None:
            return {}
        if is_time_type(self.kind):
            raise self.refusal("time_unit is for numbers: leave it out")
        raise self.refusal("timestamps are seconds since 1970, TIMESTAMP or text: cast it")

    @property
    def _number(self) -> str:
        """Return SQL that reads the column as a number; NULL for text that is no number."""
        if self.kind == "VARCHAR":
            return f"try_cast({self.sql} AS DOUBLE)"
        return f"CASE WHEN isfinite({self.sql}) THEN {self.sql} END" if self.kind in FLOATS else self.sql

    def _of_numbers(self, number: str) -> dict[str, str]:
        """Return the aggregates that decide the unit of numbers."""
        return {"least": f"min({number})", "most": f"max({number})"}

    @property
    def spelling(self) -> str | None:
        if self.kind != "VARCHAR" or self._format is not None:
            return None
        text = self.sql
        return (
            f"CASE WHEN {is_integer(text)} THEN 'integer' "
            f"WHEN regexp_full_match(trim({text}), {sql_text(NUMBER)}) THEN 'number' "
            f"WHEN ({time_of(text, None)}) IS NOT NULL THEN "
            f"CASE WHEN regexp_full_match({text}, {sql_text(_ZONE)}) THEN 'zoned' ELSE 'iso' END "
            f"WHEN regexp_full_match({text}, {sql_text(_DATED)}) THEN 'dated' WHEN {text} IS NOT NULL THEN 'text' END"
        )

    def _of_text(self) -> dict[str, str]:
        text, spelling = self.sql, self.spelling_name
        part = f"try_cast(regexp_extract({text}, '^([0-9]+)[-/.]([0-9]+)', {{0}}) AS INTEGER)"
        part = f"max(CASE WHEN {spelling} = 'dated' THEN {part} END)"
        return {
            "spellings": f"histogram({spelling})",
            "example": f"min({text}) FILTER ({spelling} IN ('dated', 'text'))",
            "first": part.format(1),
            "second": part.format(2),
            **self._of_numbers(self._number),
        }

    def typed(self, found: dict[str, Any], rows: Rows) -> Typed:
        if self._format is not None:
            return self._by_format(self._format, found["bad"], rows)
        if is_time_type(self.kind):
            return Typed(self.kind, self.sql, _of_time(self.name, self.kind))
        if self.kind != "VARCHAR":
            return self._by_unit(self.kind, self.sql, found, rows)
        spellings: dict[str, int] = found["spellings"] or {}
        if set(spellings) <= {"integer"}:
            return self._by_unit("BIGINT", f"CAST({self.sql} AS BIGINT)", found, rows)
        if set(spellings) <= {"integer", "number"}:
            return self._by_unit("DOUBLE", number_of(self.sql, "."), found, rows)
        if set(spellings) == {"dated"} and self.options.time_unit is None:
            return self._by_day_or_month(found)
        return self._by_text(spellings, found["example"], rows)

    def _by_text(self, spellings: dict[str, int], example: str, rows: Rows) -> Typed:
        """Return the type of text in ISO 8601. Raise DataError for other text."""
        values = sum(spellings.values())
        numbers = spellings.get("integer", 0) + spellings.get("number", 0)
        times = spellings.get("iso", 0) + spellings.get("zoned", 0)
        unread = self._unread(number_of(self.sql, "."))
        if self.options.time_unit is not None:
            why = "time_unit is for numbers, and this is none: leave it out, or set time_format="
            raise rows.refuse(self.name, unread, values - numbers, why)
        if numbers > max(times, spellings.get("dated", 0)):
            why = "other times are numbers, and this one is neither a number nor a time in ISO 8601: fix it"
            raise rows.refuse(self.name, unread, values - numbers, why)
        if not times:
            raise self._unknown(example)
        if times < values:
            why = "other times are in ISO 8601 (such as 2024-05-31 23:59:00), and this one is not: fix it"
            raise rows.refuse(self.name, self._unread(time_of(self.sql, None)), values - times, why)
        if 0 < spellings.get("zoned", 0) < values:
            without = f"{spellings['iso']:,} of {values:,} times of {self.name!r} name no zone"
            note(f"{self.where}: {without}: read as UTC.")
        return Typed("VARCHAR", self.sql, f"epoch_us({time_of(sql_name(self.name), None)})")

    def _by_format(self, format: str, bad: int, rows: Rows) -> Typed:
        read = time_of(as_text(self.sql, self.kind), format)
        if bad:
            why = f"time_format does not fit it: fix it, or the format {format!r}"
            raise rows.refuse(self.name, self._unread(read), bad, why)
        name = as_text(sql_name(self.name), self.kind)
        return Typed(self.kind, self.sql, f"epoch_us({time_of(name, format)})")

    def _by_day_or_month(self, found: dict[str, Any]) -> Typed:
        """Return the type of text such as 31/12/2024 10:00, if the values show which part is the day."""
        day_first, month_first = _formats(found["example"])
        if found["first"] > 12 and found["second"] > 12:
            why = f"times of {self.name!r} begin with a day in some rows and with a month in others"
            raise DataError(f"{self.where}: {why}, such as {found['example']!r}: write all in one form.")
        if found["first"] <= 12 and found["second"] <= 12:
            raise DataError(
                f"{self.where}: no value of {self.name!r} shows whether {found['example']!r} begins with the day or "
                f"with the month: set time_format={day_first!r} or time_format={month_first!r}."
            )
        format = day_first if found["first"] > 12 else month_first
        note(f"{self.where}: times of {self.name!r} are read as time_format={format!r}, the only order that fits them.")
        name = sql_name(self.name)
        dates = [format.split(" ")[0].replace(format[2], sign) for sign in "/-."]
        formats = ", ".join(sql_text(date + clock) for date in dates for clock in _CLOCKS)
        return Typed("VARCHAR", self.sql, f"epoch_us(try_strptime({name}, [{formats}]))")

    def _by_unit(self, kind: str, expression: str, found: dict[str, Any], rows: Rows) -> Typed:
        """Return the type of numbers in the unit of the option `time_unit`, or the unit that fits all of them."""
        per_second = TIME_UNITS[self.options.time_unit or self._unit(found, rows)]
        name = sql_name(self.name)
        if kind in INTEGERS | WIDE_INTEGERS and per_second <= 10**6:
            return Typed(kind, expression, to_microseconds(name, 10**6 // per_second))
        number = f"CAST({name} AS DOUBLE)"
        micros = f"CASE WHEN isfinite({number}) THEN floor({number} * 1000000 / {per_second}) END"
        if kind in INTEGERS | WIDE_INTEGERS:
            micros = f"CASE WHEN {name} < 0 THEN -1 ELSE {name} // {per_second // 10**6} END"
        return Typed(kind, expression, to_microseconds(micros, 1))

    def _unit(self, found: dict[str, Any], rows: Rows) -> str:
        if found["least"] is None:
            return "s"
        least, most = float(found["least"]), float(found["most"])
        self._refuse_dates(least, most, rows)
        if most <= LATEST_S:
            return "s"
        for unit, (low, high) in _RANGES.items():
            if low <= least and most < high:
                counts = f"{self.name!r} counts {_UNIT_NAMES[unit]} since 1970, such as {int(most):,}"
                note(f"{self.where}: {counts} (time_unit={unit}).")
                return unit
        likely = next((unit for unit, (low, high) in _RANGES.items() if low <= most < high), None)
        hint = f" (this one looks like {_UNIT_NAMES[likely]})" if likely else ""
        condition = f"coalesce({self._number} > {LATEST_S}, false)"
        why = (
            f"more than {LATEST_S:,} seconds, but other rows hold times too small for another unit: set time_unit=s, "
            f"ms, us or ns{hint}, or fix them"
        )
        raise rows.refuse(self.name, condition, rows.count(condition), why)

    def _refuse_dates(self, least: float, most: float, rows: Rows) -> None:
        """Raise DataError if all numbers look like dates such as 20240531 or 202405312359."""
        text = f"CAST(try_cast({self._number} AS HUGEINT) AS VARCHAR)"
        for length, format in ((8, "%Y%m%d"), (12, "%Y%m%d%H%M"), (14, "%Y%m%d%H%M%S")):
            if least // 10 ** (length - 4) >= 1900 and most // 10 ** (length - 4) <= 2100:
                is_date = f"try_strptime({text}, {sql_text(format)}) IS NOT NULL"
                if not rows.count(f"{self._number} IS NOT NULL AND NOT ({is_date})"):
                    raise DataError(
                        f"{self.where}: every value of {self.name!r} looks like a date (such as {int(most)}): set "
                        f"time_format={format}, or time_unit= if they are numbers of seconds."
                    )

    def _unread(self, expression: str) -> str:
        return f"{self.sql} IS NOT NULL AND ({expression}) IS NULL"

    def _unknown(self, example: str) -> DataError:
        return DataError(
            f"{self.where}: column {self.name!r} holds text such as {example!r}, which is neither a number nor a time "
            "in ISO 8601 (2024-05-31 23:59:00): set time_format=, such as '%d/%m/%Y %H:%M' or '%b %d, %Y'."
        )


def _of_time(name: str, kind: str) -> str:
    """Return SQL for the microseconds since 1970 of a time-typed column; NULL for infinity."""
    quoted = sql_name(name)
    if kind in ("TIMESTAMP_NS", "TIMESTAMPTZ_NS"):
        return f"CASE WHEN epoch_ns({quoted}) < 0 THEN -1 ELSE epoch_ns({quoted}) // 1000 END"
    return f"epoch_us({quoted if 'ZONE' in kind or kind == 'TIMESTAMPTZ' else f'CAST({quoted} AS TIMESTAMP)'})"


def _formats(example: str) -> tuple[str, str]:
    """Return the day-first and the month-first format of a text such as 31/12/2024 10:00."""
    sign = re.sub(r"[0-9]", "", example)[0]
    _, _, clock = example.partition(" ")
    parts = ["%H:%M", "%H:%M:%S"][clock.count(":") - 1] if clock else ""
    if clock.lower().endswith("m"):
        parts = parts.replace("%H", "%I") + (" %p" if clock[-3] == " " else "%p")
    time = f" {parts}" if parts else ""
    return f"%d{sign}%m{sign}%Y{time}", f"%m{sign}%d{sign}%Y{time}"
