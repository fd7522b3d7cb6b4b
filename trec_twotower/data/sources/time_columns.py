"""The column of times: seconds since 1970 from numbers of any unit, timestamps, and text in ISO 8601 or a format.

A day is never guessed from a month. Text such as 03/04/2024 is read if some value of all files shows which part is the
day (one above 12); else `time_format` has to say it. Numbers count the unit that fits every value; else `time_unit` has
to say it.
"""

from __future__ import annotations

import re
from typing import Any

from trec_twotower.data.sources.column_sql import (
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
from trec_twotower.data.sources.event_files import sql_name, sql_text
from trec_twotower.data.sources.event_log import LATEST_S
from trec_twotower.data.sources.table_columns import Column, Refuse, Typed, note
from trec_twotower.data.sources.table_options import TIME_UNITS, is_time_format
from trec_twotower.errors import ConfigError, DataError

_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Times of the years 1973 to 2286 in each unit: the ranges do not meet.
_RANGES = {unit: (10**8 * per_second, 10**10 * per_second) for unit, per_second in TIME_UNITS.items()}
_DATED = r"[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{4}( [0-9]{1,2}:[0-9]{2}(:[0-9]{2})?( ?[AaPp][Mm])?)?"
_ZONE = r".*:[0-9]{2}.*(Z|UTC|[-+][0-9:]+)"
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", " %I:%M%p", " %I:%M:%S%p")


class TimeColumn(Column):
    """The option `timestamp`."""

    @property
    def _format(self) -> str | None:
        declared = self.options.types.get(self.name, "time")
        if is_time_format(declared):
            return declared
        if declared != "time":
            raise ConfigError(
                f"types={{{self.name}: {declared}}}: this column holds times, which are time or a format."
            )
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
            return self._of_numbers(self._finite, "true")
        if is_time_type(self.kind) and self.options.time_unit is None:
            return {}
        if is_time_type(self.kind):
            raise self.refusal("time_unit is for numbers: leave it out")
        raise self.refusal("timestamps are whole seconds since 1970, TIMESTAMP or text: cast it")

    @property
    def _finite(self) -> str:
        return f"CASE WHEN isfinite({self.sql}) THEN {self.sql} END" if self.kind in FLOATS else self.sql

    def _of_numbers(self, number: str, condition: str) -> dict[str, str]:
        """What decides the unit of numbers."""
        whole = f"try_cast({number} AS HUGEINT)"
        day = f"{whole} BETWEEN 19000101 AND 21001231 AND {whole} // 100 % 100 BETWEEN 1 AND 12 AND {whole} % 100 <= 31"
        minute = (
            f"{whole} BETWEEN 190001010000 AND 210012312359 AND {whole} // 1000000 % 100 BETWEEN 1 AND 12 "
            f"AND {whole} // 10000 % 100 BETWEEN 1 AND 31 AND {whole} // 100 % 100 < 24 AND {whole} % 100 < 60"
        )
        second = f"{whole} BETWEEN 19000101000000 AND 21001231235959 AND {minute.replace(whole, f'{whole} // 100')}"
        of = {"least": f"min({number})", "most": f"max({number})", "present": f"count({number})"}
        of["late"] = f"count(CASE WHEN {number} > {LATEST_S} THEN 1 END)"
        return {name: f"{aggregate} FILTER ({condition})" for name, aggregate in of.items()} | {
            "days": f"count(*) FILTER ({condition} AND {day} AND {whole} % 100 > 0)",
            "minutes": f"count(*) FILTER ({condition} AND {minute})",
            "moments": f"count(*) FILTER ({condition} AND {second})",
        }

    def _of_text(self) -> dict[str, str]:
        text = self.sql
        is_number = f"coalesce(regexp_full_match(trim({text}), {sql_text(NUMBER)}), false)"
        iso, dated = f"({time_of(text, None)}) IS NOT NULL", f"regexp_full_match({text}, {sql_text(_DATED)})"
        part = "try_cast(regexp_extract({0}, '^([0-9]+)[-/.]([0-9]+)', {1}) AS INTEGER)"
        return {
            "values": f"count({text})",
            "integers": f"count(*) FILTER ({is_integer(text)})",
            "numbers": f"count(*) FILTER ({is_number})",
            "iso": f"count(*) FILTER ({iso})",
            "zoned": f"count(*) FILTER ({iso} AND regexp_full_match({text}, {sql_text(_ZONE)}))",
            "dated": f"count(*) FILTER ({dated})",
            "first": f"max({part.format(text, 1)}) FILTER ({dated})",
            "second": f"max({part.format(text, 2)}) FILTER ({dated})",
            "example": f"min({text}) FILTER (NOT {is_number} AND NOT ({iso}))",
            **self._of_numbers(number_of(text, "."), is_number),
        }

    def typed(self, found: dict[str, Any], refuse: Refuse) -> Typed:
        if self._format is not None:
            return self._by_format(self._format, found["bad"], refuse, "time_format does not fit it")
        if is_time_type(self.kind):
            return Typed(self.kind, self.sql, _seconds_of_time(self.name, self.kind))
        if self.kind != "VARCHAR":
            return self._by_unit(self.kind, self.sql, found, refuse)
        values = found["values"]
        if found["integers"] == values:
            return self._by_unit("BIGINT", f"CAST({self.sql} AS BIGINT)", found, refuse)
        if found["numbers"] == values:
            return self._by_unit("DOUBLE", number_of(self.sql, "."), found, refuse)
        if self.options.time_unit is not None:
            raise refuse(
                self.name,
                self._unread(number_of(self.sql, ".")),
                values - found["numbers"],
                "time_unit is for numbers, and this is none: leave it out, or say time_format=",
            )
        if found["dated"] and found["dated"] == values:
            return self._by_day_or_month(found, refuse)
        if found["numbers"] > max(found["iso"], found["dated"]):
            why = "other times are numbers, and this one is neither a number nor a time in ISO 8601: fix it"
            raise refuse(self.name, self._unread(number_of(self.sql, ".")), values - found["numbers"], why)
        if not found["iso"]:
            raise self._unknown(found["example"])
        if found["iso"] < values:
            why = "other times are in ISO 8601 (such as 2024-05-31 23:59:00), and this one is not: fix it"
            raise refuse(self.name, self._unread(time_of(self.sql, None)), values - found["iso"], why)
        if 0 < found["zoned"] < values:
            note(
                f"{self.where}: {values - found['zoned']:,} of {values:,} times of {self.name!r} name no zone: read "
                "as UTC."
            )
        return Typed("VARCHAR", self.sql, _seconds(f"epoch_us({time_of(sql_name(self.name), None)})", 10**6))

    def _by_format(self, format: str, bad: int, refuse: Refuse, why: str) -> Typed:
        text = as_text(self.sql, self.kind)
        if bad:
            raise refuse(
                self.name, self._unread(time_of(text, format)), bad, f"{why}: fix it, or the format {format!r}"
            )
        name = as_text(sql_name(self.name), self.kind)
        return Typed(self.kind, self.sql, _seconds(f"epoch_us({time_of(name, format)})", 10**6))

    def _by_day_or_month(self, found: dict[str, Any], refuse: Refuse) -> Typed:
        """Text such as 31/12/2024 10:00, if it shows which part is the day."""
        day_first, month_first = _formats(found["example"])
        if found["first"] > 12 and found["second"] > 12:
            why = f"times of {self.name!r} begin with a day in some rows and with a month in others"
            raise DataError(f"{self.where}: {why}, such as {found['example']!r}: write all in one form.")
        if found["first"] <= 12 and found["second"] <= 12:
            raise DataError(
                f"{self.where}: no value of {self.name!r} shows whether {found['example']!r} begins with the day or "
                f"with the month: say time_format={day_first!r} or time_format={month_first!r}."
            )
        format = day_first if found["first"] > 12 else month_first
        note(f"{self.where}: times of {self.name!r} are read as time_format={format!r}, the only order that fits them.")
        name = sql_name(self.name)
        dates = [format.split(" ")[0].replace(format[2], sign) for sign in "/-."]
        formats = ", ".join(sql_text(date + clock) for date in dates for clock in _CLOCKS)
        return Typed("VARCHAR", self.sql, _seconds(f"epoch_us(try_strptime({name}, [{formats}]))", 10**6))

    def _by_unit(self, kind: str, expression: str, found: dict[str, Any], refuse: Refuse) -> Typed:
        """Numbers, of the unit that the option says or that fits all of them."""
        unit = self.options.time_unit or self._unit(found, refuse)
        per_second = TIME_UNITS[unit]
        name = sql_name(self.name)
        if kind in INTEGERS | WIDE_INTEGERS:
            return Typed(kind, expression, _seconds(name, per_second))
        number = f"CAST({name} AS DOUBLE)"
        seconds = f"CASE WHEN isfinite({number}) THEN try_cast(floor({number} / {per_second}) AS BIGINT) END"
        return Typed(kind, expression, seconds)

    def _unit(self, found: dict[str, Any], refuse: Refuse) -> str:
        if not found["present"]:
            return "s"
        for name, format in (("days", "%Y%m%d"), ("minutes", "%Y%m%d%H%M"), ("moments", "%Y%m%d%H%M%S")):
            if found[name] == found["present"]:
                raise DataError(
                    f"{self.where}: every value of {self.name!r} looks like a date (such as {int(found['most'])}): say "
                    f"time_format={format}, or time_unit= if they are numbers of seconds."
                )
        least, most = float(found["least"]), float(found["most"])
        if most <= LATEST_S:
            return "s"
        for unit, (low, high) in _RANGES.items():
            if low <= least and most < high:
                counts = f"{self.name!r} counts {_UNIT_NAMES[unit]} since 1970, such as {int(most):,}"
                note(f"{self.where}: {counts} (time_unit={unit}).")
                return unit
        likely = next((unit for unit, (low, high) in _RANGES.items() if low <= most < high), None)
        hint = f" (this one looks like {_UNIT_NAMES[likely]})" if likely else ""
        condition = f"{number_of(self.sql, '.') if self.kind == 'VARCHAR' else self._finite} > {LATEST_S}"
        why = (
            f"more than {LATEST_S:,} seconds, but other rows hold times too small for another unit: say time_unit=s, "
            f"ms, us or ns{hint}, or fix them"
        )
        raise refuse(self.name, condition, found["late"], why)

    def _unread(self, expression: str) -> str:
        return f"{self.sql} IS NOT NULL AND ({expression}) IS NULL"

    def _unknown(self, example: str) -> DataError:
        return DataError(
            f"{self.where}: column {self.name!r} holds text such as {example!r}, which is neither a number nor a time "
            "in ISO 8601 (2024-05-31 23:59:00): say time_format=, such as '%d/%m/%Y %H:%M' or '%b %d, %Y'."
        )


def _seconds(count: str, per_second: int) -> str:
    """SQL: a count of parts of a second as whole seconds, rounded down also before 1970."""
    if per_second == 1:
        return f"try_cast({count} AS BIGINT)"
    whole = f"CAST({count} AS HUGEINT)"
    return f"try_cast(({whole} - (({whole} % {per_second}) + {per_second}) % {per_second}) // {per_second} AS BIGINT)"


def _seconds_of_time(name: str, kind: str) -> str:
    quoted = sql_name(name)
    if kind in ("TIMESTAMP_NS", "TIMESTAMPTZ_NS"):
        return _seconds(f"epoch_ns({quoted})", 10**9)
    as_micros = quoted if "TIME ZONE" in kind or kind == "TIMESTAMPTZ" else f"CAST({quoted} AS TIMESTAMP)"
    return _seconds(f"epoch_us({as_micros})", 10**6)


def _formats(example: str) -> tuple[str, str]:
    """The formats of a text such as 31/12/2024 10:00, with the day first and with the month first."""
    sign = re.sub(r"[0-9]", "", example)[0]
    _, _, clock = example.partition(" ")
    parts = ["%H:%M", "%H:%M:%S"][clock.count(":") - 1] if clock else ""
    if clock.lower().endswith("m"):
        parts = parts.replace("%H", "%I") + (" %p" if clock[-3] == " " else "%p")
    time = f" {parts}" if parts else ""
    return f"%d{sign}%m{sign}%Y{time}", f"%m{sign}%d{sign}%Y{time}"
