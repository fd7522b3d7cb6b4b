"""Quantiles, bins and clipped numbers, against a reading value by value."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.features import numeric as numbers
from trec_twotower.data.features import statistics
from trec_twotower.data.features.numeric import number_values
from trec_twotower.data.features.statistics import Statistics, learn_statistics
from trec_twotower.errors import ConfigError
from trec_twotower.ops.ragged import Ragged

ID = build_feature(name="item_id", kind="id", buckets=8, dim=4)
VALUES = st.lists(st.none() | st.integers(-20, 20).map(float), min_size=1, max_size=40)


def number(**changes) -> FeatureSpec:
    return build_feature(**{"name": "price", "kind": "number"} | changes)


def learned(feature: FeatureSpec, *parts: list[float | None]) -> Statistics:
    return learn_statistics(feature, (number_values(feature, pa.array(part, pa.float64()), "here") for part in parts))


def normalize(feature: FeatureSpec, array: pa.Array, statistics: Statistics) -> np.ndarray:
    return numbers.normalize(feature, *number_values(feature, array, "here"), statistics)


def binned(feature: FeatureSpec, array: pa.Array, statistics: Statistics) -> Ragged:
    return numbers.binned(feature, *number_values(feature, array, "here"), statistics)


# Quantiles


@given(VALUES, VALUES)
def test_a_number_by_quantile_is_the_share_of_the_learned_values_below_it(values, asked):
    """Each learned value's mid-rank, where there are as few as points: values that are equal count half."""
    known = sorted(value for value in values if value is not None)
    feature = number(normalize="quantile")
    found = normalize(feature, pa.array(asked, pa.float64()), learned(feature, values))
    for value, (share, is_missing) in zip(asked, found.tolist(), strict=True):
        assert is_missing == (value is None)
        if value is None:
            assert share == 0
            continue
        if not known or known[0] == known[-1]:
            assert share == 0.5
            continue
        value = min(max(value, known[0]), known[-1])  # what lies beyond all learned values is as the last of them
        if value == known[0] and known.count(known[0]) == 1:
            assert share == 0
        elif value == known[-1] and known.count(known[-1]) == 1:
            assert share == 1
        else:
            # Between the ranks of the neighbours; 129 points and ties move it by a rank or so.
            slack = 1.6 / (len(known) - 1)
            below = sum(other < value for other in known) / (len(known) - 1)
            through = sum(other <= value for other in known) / (len(known) - 1)
            assert below - slack <= share <= through + slack


def test_a_skewed_column_becomes_even_by_quantile(rng):
    values = rng.lognormal(0.0, 3.0, 5000)
    feature = number(normalize="quantile")
    statistics = learned(feature, values[:2000].tolist(), values[2000:].tolist())
    found = normalize(feature, pa.array(values), statistics)[:, 0]
    exact = np.argsort(np.argsort(values)) / (len(values) - 1)
    assert np.abs(found - exact).max() < 0.01


def test_quantiles_of_more_rows_than_are_kept_are_those_of_a_sample_that_no_part_decides(monkeypatch, rng):
    monkeypatch.setattr(statistics, "SAMPLE", 400)
    values = rng.permutation(4000).astype(float).tolist()
    feature = number(normalize="quantile")
    first = learned(feature, values)
    assert first == learned(feature, values[:7], values[7:1500], [None] * 3, values[1500:])
    assert np.abs(np.array(first.points) / 3999 - np.linspace(0, 1, len(first.points))).max() < 0.1
    assert len(set(first.points)) > 100


# Clipping


@given(VALUES, st.none() | st.integers(-9, 0), st.none() | st.integers(1, 9))
def test_clipped_numbers_are_clipped_before_anything_is_learned_of_them(values, low, high):
    def cut(value):
        value = value if low is None else max(value, low)
        return value if high is None else min(value, high)

    feature = number(clip=(low, high), normalize="none")
    known = [cut(value) for value in values if value is not None]
    statistics = learned(feature, values)
    assert (statistics.low, statistics.high) == ((min(known), max(known)) if known else (0, 1))
    found = normalize(feature, pa.array(values, pa.float64()), statistics).tolist()
    assert found == [[0, 1] if value is None else [cut(value), 0] for value in values]


# Bins


@given(VALUES, st.lists(st.integers(-15, 15), min_size=1, max_size=5, unique=True).map(sorted))
def test_a_number_falls_into_the_bin_that_its_value_has_reached(values, begins):
    feature = number(bins=begins, dim=4)
    found = binned(feature, pa.array(values, pa.float64()), Statistics())
    assert found.is_single and feature.own_table == TableSpec(buckets=len(begins) + 2, dim=4)
    expected = [0 if value is None else 1 + sum(value >= begin for begin in begins) for value in values]
    assert found.values.tolist() == expected


def test_learned_bins_hold_equally_many_rows(rng):
    values = rng.lognormal(0.0, 2.0, 1000)
    feature = number(bins=8, dim=4)
    found = binned(feature, pa.array(values), learned(feature, values.tolist())).values
    assert np.bincount(found).tolist() == [0] + [125] * 8
    assert feature.own_table.buckets == 9


@given(VALUES, st.integers(2, 6))
def test_bins_of_few_distinct_values_stay_within_the_table(values, bins):
    for soft in (False, True):
        feature = number(bins=bins, dim=4, soft=soft)
        statistics = learned(feature, values)
        assert list(statistics.points) == sorted(set(statistics.points))
        found = binned(feature, pa.array([-1e9, *values, 1e9], pa.float64()), statistics)
        assert found.values.min() >= 0 and found.values.max() < feature.own_table.buckets


@given(VALUES, st.lists(st.integers(-15, 15), min_size=2, max_size=5, unique=True).map(sorted))
def test_a_soft_bin_lies_between_its_neighbours_in_proportion(values, points):
    """The weighted mean of the points' own values gives the number back, as far as they reach."""
    feature = number(bins=points, dim=4, soft=True)
    found = binned(feature, pa.array(values, pa.float64()), Statistics())
    assert feature.own_table.buckets == len(points) + 1 and len(found) == len(values)
    for row, value in enumerate(values):
        rows, weights = found.values[2 * row : 2 * row + 2], found.weights[2 * row : 2 * row + 2]
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
        if value is None:
            assert rows.tolist() == [0, 0] and weights.tolist() == [1, 0]
            continue
        back = sum(points[place - 1] * weight for place, weight in zip(rows, weights, strict=True))
        assert back == pytest.approx(min(max(value, points[0]), points[-1]), abs=1e-5)
        assert rows[1] == rows[0] + 1


def test_bins_are_a_table_and_no_numbers():
    age, price = number(name="age", bins=4, dim=8), number(name="price", bins=4, dim=12, soft=True)
    schema = Schema.build({}, (age,), (ID, price))
    assert schema.layout.pooled_keys == ["user:age", "item:item_id", "item:price"]
    assert (schema.layout.input_width("user"), schema.layout.input_width("item")) == (8, 4 + 12)
    assert schema.layout.is_weighted and not Schema.build({}, (age,), (ID,)).layout.is_weighted
    assert {name: table.buckets for name, table in schema.tables.items()} == {"age": 5, "item_id": 8, "price": 5}


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"bins": 4}, "has bins or frequencies, but no dim"),
        ({"dim": 4}, "has dim, but no bins or frequencies"),
        ({"soft": True}, "has soft, but no bins"),
        ({"bins": [], "dim": 4}, "write ascending values, at least one"),
        ({"bins": [1, 1], "dim": 4}, "write ascending values, at least one"),
        ({"bins": [1], "dim": 4, "soft": True}, "give two values or more"),
        ({"bins": 4, "dim": 4, "normalize": "minmax"}, "normalize: minmax makes no difference"),
        ({"clip": [3, 1]}, "'clip' is [3, 1]: write the least value first"),
    ],
)
def test_settings_of_a_number_that_clash_are_refused(feature, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        number(**feature)
