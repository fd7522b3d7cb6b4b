"""Lists of times are read like columns of times: any type, any unit, and never one unit for another."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.data.features.transform import transform
from trec_twotower.errors import DataError

TABLE = {"item": TableSpec(buckets=9, dim=4)}
DAYS = (0, 1, 4)
START = datetime(2023, 11, 14, tzinfo=UTC)
INSTANTS = [START + timedelta(days=days) for days in DAYS]
SECONDS = [int(instant.timestamp()) for instant in INSTANTS]
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

# What each type holds of the same three instants, and the feature's `unit`.
FORMS = {
    **{f"integers in {unit}": (pa.array([s * per for s in SECONDS]), unit) for unit, per in PER_SECOND.items()},
    **{
        f"timestamp[{unit}, {zone}]": (pa.array([s * per for s in SECONDS], pa.timestamp(unit, zone)), "s")
        for unit, per in PER_SECOND.items()
        for zone in (None, "UTC", "Europe/Oslo")
    },
    "unsigned seconds": (pa.array(SECONDS, pa.uint32()), "s"),
    "floating-point milliseconds": (pa.array([s * 1e3 for s in SECONDS]), "ms"),
    "decimal seconds": (pa.array([Decimal(s) for s in SECONDS], pa.decimal128(20, 3)), "s"),
    "date32": (pa.array([instant.date() for instant in INSTANTS], pa.date32()), "s"),
    "date64": (pa.array([instant.date() for instant in INSTANTS], pa.date64()), "s"),
}


def bag(**parts) -> FeatureSpec:
    return build_feature(name="history", kind="bag", table="item", times="when", half_life_days=2.0, **parts)


def steps(**parts) -> FeatureSpec:
    return build_feature(name="history", kind="sequence", table="item", times="when", max_length=9, **parts)


def transformed(feature: FeatureSpec, times: pa.Array, **columns: pa.Array):
    lists = pa.ListArray.from_arrays([0, len(times)], times)
    table = pa.table({"history": pa.array([list(range(len(times)))]), "when": lists, **columns})
    return transform([feature], TABLE, {}, table, "here").sparse


@pytest.mark.parametrize("form", FORMS)
def test_a_fading_bag_weighs_the_same_instants_alike_in_every_type(form):
    times, unit = FORMS[form]
    expected = [0.5 ** ((DAYS[-1] - days) / 2) for days in DAYS]
    np.testing.assert_allclose(transformed(bag(unit=unit), times)["history"].weights, expected, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gaps_between_steps_are_the_same_in_every_type(form):
    times, unit = FORMS[form]
    gap_s = [86_400 * (later - earlier) for earlier, later in pairwise(DAYS)]
    expected = [0, *(int(1 + np.log2(1 + gap)) for gap in gap_s)]
    assert transformed(steps(unit=unit), times)["history@gap"].values.tolist() == expected


@pytest.mark.parametrize("feature", [bag, steps])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_times_of_another_unit_are_refused_with_row_and_setting(feature, unit):
    times = pa.array([s * PER_SECOND[unit] for s in SECONDS])
    lists = pa.array([[SECONDS[0]], times.to_pylist()])
    table = pa.table({"history": pa.array([[1], [2, 3, 4]]), "when": lists})
    with pytest.raises(DataError) as error:
        transform([feature()], TABLE, {}, table, "train/a.parquet")
    for part in ("train/a.parquet, column 'history', times 'when'", "3 of 4 times", "row 1", "`unit` (now s)"):
        assert part in str(error.value)
    transform([feature(unit=unit)], TABLE, {}, table.slice(1), "train/a.parquet")


def test_until_counts_in_the_unit_of_the_feature():
    until = pa.array([(SECONDS[-1] + 2 * 86_400) * 1000])
    found = transformed(bag(unit="ms", until="now"), pa.array([s * 1000 for s in SECONDS]), now=until)
    np.testing.assert_allclose(found["history"].weights, [0.5 ** ((6 - days) / 2) for days in DAYS], rtol=1e-6)


@pytest.mark.parametrize(
    "times",
    [pa.array([True, False]), pa.array(["2023-11-14", "2023-11-15"]), pa.array([1, 2], pa.duration("s")),
     pa.array([1, 2], pa.time32("s"))],
    ids=str,
)  # fmt: skip
def test_lists_that_hold_no_times_are_refused(times):
    with pytest.raises(DataError, match="not a list of timestamps, dates or numbers"):
        transformed(bag(), times)


@pytest.mark.parametrize("kind", ["bag", "sequence"])
def test_a_unit_without_times_is_refused(kind):
    with pytest.raises(ValueError, match="has unit: ms, but no `times`"):
        build_feature(name="history", kind=kind, table="item", unit="ms", max_length=9)


def test_a_date_of_a_list_is_its_midnight():
    days = pa.array([date(2023, 11, 14), date(2023, 11, 16)])
    assert transformed(bag(), days)["history"].weights.tolist() == [0.5, 1.0]
