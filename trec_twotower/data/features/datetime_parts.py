"""Parts of a time (hour, weekday, month) and ages in days."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.config.feature_spec import FeatureSpec, TimeUnit
from trec_twotower.config.features import AgeFeature, TimeFeature
from trec_twotower.data.features.numeric import NumericReader, clipped, is_number
from trec_twotower.data.features.reader import FeatureReader, FeatureRows, Values
from trec_twotower.errors import DataError
from trec_twotower.ops.ragged import Ragged

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
DAY_S = 86_400
LAST_S = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())
NULL_PART = 0  # row of null in the table of a time feature


class TimeReader(FeatureReader[TimeFeature]):
    needs = "timestamps, dates or numbers"

    def fits(self, kind: pa.DataType) -> bool:
        return is_time(kind)

    def read(self, rows: FeatureRows[TimeFeature]) -> Values:
        return {rows.feature.name: Ragged.singles(parts(rows.feature, rows.array, rows.place))}


class AgeReader(NumericReader[AgeFeature]):
    needs = "timestamps, dates or numbers"

    def fits(self, kind: pa.DataType) -> bool:
        return is_time(kind)

    def numbers(self, rows: FeatureRows[AgeFeature]) -> tuple[np.ndarray, np.ndarray]:
        until = rows.column(rows.feature.until) if rows.feature.until else None
        return ages(rows.feature, rows.array, until, rows.place)


def is_time(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold times."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind) or (is_number(kind) and not pa.types.is_boolean(kind))


def counted(array: pa.Array) -> tuple[pa.Array, str]:
    """Return timestamps as integers and their unit; nanoseconds are cut to microseconds.

    float64 holds present times exactly in microseconds but not in nanoseconds, so that one instant in columns of
    different units would get two values.
    """
    unit = array.type.unit
    if unit == "ns":
        unit, array = "us", array.cast(pa.timestamp("us", array.type.tz), safe=False)
    return array.cast(pa.int64()), unit


def seconds(
    name: str, unit: TimeUnit, array: pa.Array, where: str, row_of: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds since 1970 in UTC (float64), and which values are missing.

    Numbers are in `unit`; timestamps without a zone are in UTC. `name` is the feature's, for messages. `row_of` has the
    row of each value where the values are elements of lists. Raises DataError for times after the year
    9999, which usually are in another unit.
    """
    missing = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("ms"))
    counts: str = unit
    if is_stamp := pa.types.is_timestamp(array.type):
        array, counts = counted(array)
    if pa.types.is_integer(array.type):
        value = array.fill_null(0).to_numpy(zero_copy_only=False) / PER_SECOND[counts]
    else:
        value = array.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False) / PER_SECOND[counts]
    odd = ~(np.abs(value) <= LAST_S)
    if odd.any():
        first = int(np.flatnonzero(odd)[0])
        row = first if row_of is None else int(row_of[first])
        fixes = ["write null for a missing time"] if row_of is None else ["leave such elements out"]
        fixes += [] if is_stamp else [f"set `unit` (now {counts}) of feature {name!r} to the unit of its numbers"]
        raise DataError(
            f"{where}: {int(odd.sum()):,} of {len(value):,} times are no dates of the years up to 9999, the first "
            f"({array[first].as_py()}) in row {row:,}: {', or '.join(fixes)}."
        )
    return value, missing


def parts(feature: TimeFeature, array: pa.Array, where: str) -> np.ndarray:
    """Return the hour, weekday (Monday first), hour of the week or month of each time in the feature's zone, from 1 on.

    Null is 0.
    """
    value, missing = seconds(feature.name, feature.unit, array, where)
    local = np.floor(value).astype(np.int64)
    if feature.zone != "UTC":
        utc = pa.array(local).cast(pa.timestamp("s", "UTC"))
        local = pc.local_timestamp(utc.cast(pa.timestamp("s", feature.zone))).cast(pa.int64()).to_numpy()
    hour, weekday = local // 3600 % 24, (local // DAY_S + 3) % 7  # 1970 began on a Thursday
    if feature.part == "month":
        part = local.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64) % 12
    else:
        part = {"hour": hour, "weekday": weekday, "hour_of_week": 24 * weekday + hour}[feature.part]
    return np.where(missing, NULL_PART, part + 1).astype(np.int32)


def ages(feature: AgeFeature, array: pa.Array, until: pa.Array | None, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return days (float64, clipped) from each time to that in `until`, or to the date `at`, and which are missing."""
    since, missing = seconds(feature.name, feature.unit, array, where)
    if until is None:
        assert feature.at is not None
        end: np.ndarray | float = instant(feature.at).timestamp()
    else:
        end, unknown = seconds(feature.name, feature.unit, until, f"{where}, until column {feature.until!r}")
        missing = missing | unknown
    days = np.where(missing, 0.0, (end - since) / DAY_S)
    return clipped(feature, days), missing


def instant(text: str) -> datetime:
    """Return a time from ISO format, in UTC if it has no zone. Raises ValueError for other text."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def check_time(feature: FeatureSpec, column: str, kind: pa.DataType, where: str) -> None:
    """Raise DataError if the type of a column is not valid as the end of an age."""
    if not is_time(kind):
        raise DataError(
            f"{where}: column {column!r} is {kind}, but feature {feature.name!r} counts ages until it: "
            "timestamps, dates or numbers are needed."
        )
