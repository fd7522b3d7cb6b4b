"""Crosses of columns and parts of times, against a reading value by value."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.data.features.datetime_parts import PER_SECOND, ages, parts
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.transform import transform
from trec_twotower.data.item_table import check_side
from trec_twotower.data.split import Split
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.ops.hashing import mix

# Crosses

CROSS = build_feature(name="both", kind="cross", columns=["country", "device"], table="t")
TABLE = TableSpec(buckets=1000, dim=4, seed=9)
COUNTRIES = st.none() | st.sampled_from(["NO", "SE", "", "Ö"])
DEVICES = st.none() | st.integers(-(2**63), 2**63 - 1)


def slow_cross(*values: int | str | None) -> int:
    state = 0
    for value in values:
        if value is None:
            key = int.from_bytes(b"NULL-KEY", "big")
        else:
            key = value if isinstance(value, int) else xxhash.xxh3_64_intdigest(value.encode())
        state = mix(key % 2**64 ^ state)
    return (mix(state ^ mix(TABLE.seed)) >> 32) * TABLE.buckets >> 32


def crossed(feature: FeatureSpec, **columns: pa.Array) -> list[int]:
    return transform([feature], {"t": TABLE}, {}, pa.table(columns), "here").sparse["both"].values.tolist()


@given(st.lists(st.tuples(COUNTRIES, DEVICES, COUNTRIES), max_size=6))
def test_a_cross_is_the_hash_of_all_its_columns(rows):
    country, device, shop = ([row[place] for row in rows] for place in range(3))
    columns = {"country": pa.array(country, pa.string()), "device": pa.array(device, pa.int64())}
    assert crossed(CROSS, **columns) == [slow_cross(*row[:2]) for row in rows]
    columns["country"] = columns["country"].dictionary_encode()
    columns["shop"] = pa.array(["x", *shop], pa.string()).slice(1)
    three = CROSS.model_copy(update={"columns": ("country", "device", "shop")})
    assert crossed(three, **columns) == [slow_cross(*row) for row in rows]


def test_pairs_of_a_cross_fall_apart():
    """Few of a thousand pairs share a row of many; the order of the columns counts."""
    pairs = list(product(range(30), range(30)))
    columns = {name: pa.array([pair[place] for pair in pairs]) for place, name in enumerate(("country", "device"))}
    table = {"t": TableSpec(buckets=1 << 30, dim=4)}
    found = transform([CROSS], table, {}, pa.table(columns), "here").sparse["both"].values
    assert len(set(found.tolist())) == 900


# Times

TIMES = st.datetimes(datetime(1905, 1, 1), datetime(2037, 1, 1)).map(lambda time: time.replace(tzinfo=UTC))
ZONES = ["UTC", "Europe/Oslo", "America/St_Johns", "Asia/Kathmandu"]
COUNTS = {"hour": 24, "weekday": 7, "hour_of_week": 168, "month": 12}


def time_of(**changes) -> FeatureSpec:
    return build_feature(**{"name": "when", "kind": "time", "part": "hour", "dim": 4} | changes)


@pytest.mark.parametrize("zone", ZONES)
@given(st.lists(st.none() | TIMES, max_size=5), st.sampled_from(["s", "ms", "us"]))
def test_a_time_is_told_as_the_clock_on_the_wall_tells_it(zone, times, unit):
    local = [time and time.astimezone(ZoneInfo(zone)) for time in times]
    expected = {
        "hour": [time and time.hour for time in local],
        "weekday": [time and time.weekday() for time in local],
        "hour_of_week": [time and 24 * time.weekday() + time.hour for time in local],
        "month": [time and time.month - 1 for time in local],
    }
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    micros = [time and (time - epoch) // timedelta(microseconds=1) for time in times]
    as_numbers = [value if value is None else value // (1_000_000 // PER_SECOND[unit]) for value in micros]
    holders = {
        "numbers": pa.array(as_numbers, pa.int64()),
        "zoned": pa.array(times, pa.timestamp("us", "UTC")),
        "elsewhere": pa.array(times, pa.timestamp("us", "UTC")).cast(pa.timestamp("us", "Asia/Tokyo")),
        "plain": pa.array(micros, pa.int64()).cast(pa.timestamp("us")),
    }
    for part, wanted in expected.items():
        feature = time_of(part=part, zone=zone, unit=unit)
        assert feature.own_table.buckets == COUNTS[part] + 1
        for name, array in holders.items():
            found = parts(feature, array, "here").tolist()
            assert found == [0 if value is None else value + 1 for value in wanted], name


def test_a_date_is_its_midnight():
    dates = pa.array([datetime(2023, 6, 30).date(), None])
    assert parts(time_of(), dates, "here").tolist() == [1, 0]
    assert parts(time_of(part="weekday"), dates, "here").tolist() == [1 + 4, 0]  # a Friday


@given(st.lists(st.tuples(st.none() | TIMES, st.none() | TIMES), max_size=5))
def test_an_age_is_the_days_between(pairs):
    since, until = ([pair[place] for pair in pairs] for place in range(2))
    arrays = [pa.array(times, pa.timestamp("us", "UTC")) for times in (since, until)]
    feature = build_feature(name="when", kind="time", part="age", until="now", clip=(0, None))
    days, missing = ages(feature, *arrays, "here")
    assert missing.tolist() == [one is None or other is None for one, other in pairs]
    for (one, other), found in zip(pairs, days, strict=True):
        if one is not None and other is not None:
            assert found == pytest.approx(max((other - one) / timedelta(days=1), 0), abs=1e-6)
    fixed = build_feature(name="when", kind="time", part="age", at="2023-06-30")
    found, _ = ages(fixed, pa.array([datetime(2023, 6, 29, 12)]), None, "here")
    assert found.tolist() == [0.5]


def test_an_age_is_normalised_and_binned_as_a_number():
    table = pa.table({"born": pa.array([0, 86_400, None]), "now": pa.array([86_400, 4 * 86_400, 0])})
    plain = build_feature(name="age", kind="time", part="age", column="born", until="now", normalize="none")
    columns = transform([plain], {}, {"age": Statistics()}, table, "here")
    assert columns.numbers["age"].tolist() == [[1, 0], [3, 0], [0, 1]]
    binned = build_feature(name="age", kind="time", part="age", column="born", until="now", bins=[2], dim=4)
    columns = transform([binned], {"age": binned.own_table}, {"age": Statistics()}, table, "here")
    assert columns.sparse["age"].values.tolist() == [1, 2, 0]


def test_times_that_are_none_name_the_unit():
    with pytest.raises(DataError, match=r"here: 1 of 2 times are no dates .* \(1700000000000\) in row 1: .* \(now s\)"):
        parts(time_of(), pa.array([0, 1_700_000_000_000]), "here")
    with pytest.raises(DataError, match=r"\(nan\) in row 0"):
        parts(time_of(), pa.array([np.nan]), "here")


def test_every_column_is_looked_at_before_anything_is_read(tmp_path, write_dataset):
    table = pa.table({"country": ["NO"], "device": [1.5], "when": [True]})
    split = Split(write_dataset(tmp_path / "d", items=table) / "items", "items")
    with pytest.raises(DataError, match="column 'device' is double, but feature 'both' of kind 'cross' needs integers"):
        check_side([CROSS], split)
    with pytest.raises(DataError, match="column 'when' is bool, but feature 'when' of kind 'time' needs timestamps"):
        check_side([time_of()], split)
    with pytest.raises(ConfigError, match="no column 'now'"):
        check_side([build_feature(name="country", kind="time", part="age", until="now", column="device")], split)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"kind": "cross", "table": "t"}, "'columns' is missing"),
        ({"kind": "cross", "table": "t", "columns": ["a"]}, "'columns' is ['a']: list should have at least 2 items"),
        ({"kind": "cross", "columns": ["a", "b"]}, "needs `table`"),
        ({"kind": "cross", "table": "t", "columns": ["a", "b"], "column": "c"}, "has no column: remove it"),
        ({"kind": "id", "table": "t", "columns": ["a", "b"]}, "has no columns: remove it"),
        ({"kind": "time"}, "'part' is missing"),
        ({"kind": "time", "part": "hour"}, "'dim' is missing"),
        ({"kind": "time", "part": "hour", "dim": 4, "bins": 3, "until": "x"}, "which has no bins, until: remove it"),
        ({"kind": "time", "part": "age"}, "name the column of the time at which it is measured (`until`)"),
        ({"kind": "time", "part": "age", "until": "x", "at": "2020-01-01"}, "name the column of the time at which"),
        ({"kind": "time", "part": "age", "at": "soon"}, "'at' is 'soon': write a date such as 2023-06-30"),
        (
            {"kind": "time", "part": "age", "until": "x", "zone": "Europe/Oslo"},
            "is of kind 'time' with part: age, which has no zone: remove it",
        ),
        (
            {"kind": "time", "part": "hour", "dim": 4, "zone": "Europe/Osol"},
            "not a time zone known here (nearest: 'Europe/Oslo')",
        ),
    ],
)
def test_settings_that_clash_are_refused(feature, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_feature(name="f", **feature)
