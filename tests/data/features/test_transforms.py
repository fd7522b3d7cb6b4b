"""Arrow columns become hashed lists and normalised numbers as a slow reading, row by row, has it."""

from __future__ import annotations

import decimal
import math
import re

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.data.features.lists import is_id_list
from trec_twotower.data.features.transform import check_kind
from trec_twotower.data.features.statistics import learn_statistics as learn_of_values
from trec_twotower.data.features.numeric import normalize as normalise_values
from trec_twotower.data.features.numeric import number_values
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.hashed import category
from trec_twotower.data.features.lists import key_lists, put_pooling_divisor
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.transform import transform
from trec_twotower.data.item_table import check_side
from trec_twotower.data.split import Split
from trec_twotower.errors import DataError
from trec_twotower.ops.hashing import mix
from trec_twotower.ops.ragged import Ragged

MIX = TableSpec(buckets=50, dim=4, seed=3)
MODULO = TableSpec(buckets=50, dim=4, hashing="modulo")
TABLES = st.sampled_from([MIX, MODULO])


# The slow reading


def slow_bucket(value: int | str, buckets: int, spec: TableSpec) -> int:
    key = value if isinstance(value, int) else xxhash.xxh3_64_intdigest(value.encode())
    if spec.hashing == "modulo":
        return (key - 2**64 if key >= 2**63 else key) % buckets
    return (mix((key % 2**64) ^ mix(spec.seed)) >> 32) * buckets >> 32


def bag(feature: FeatureSpec, spec: TableSpec, ids: pa.Array, weights: pa.Array | None) -> Ragged:
    """Return the lists of a bag that looks up table `t`."""
    columns = {feature.source_column: ids} | ({} if weights is None else {"w": weights})
    return transform([feature], {"t": spec}, {}, pa.table(columns), "here").sparse[feature.name]


def slow_bag(rows, weights, spec: TableSpec, max_length: int | None) -> tuple[list, list]:
    buckets, kept_weights = [], []
    for r, row in enumerate(rows):
        pairs = [(v, weights[r][j] if weights else 1.0) for j, v in enumerate(row or []) if v is not None]
        pairs = pairs[-max_length:] if max_length else pairs
        buckets.append([slow_bucket(v, spec.buckets, spec) for v, _ in pairs])
        kept_weights.append([w for _, w in pairs])
    return buckets, kept_weights


def plain(lists: Ragged) -> list[list]:
    return [part.tolist() for part in np.split(lists.values, lists.offsets[1:-1])] if len(lists) else []


def plain_weights(lists: Ragged) -> list[list]:
    return plain(Ragged(lists.offsets, lists.weights))


def bag_of(**changes) -> FeatureSpec:
    return build_feature(**{"name": "tags", "kind": "bag", "table": "t"} | changes)


# Every way in which Arrow can hold the same lists


def as_sliced(rows, kind):
    return pa.array([rows[0] if rows else None, [], *rows, None, []], pa.list_(kind)).slice(2, len(rows))


def as_chunked(rows, kind):
    half = len(rows) // 2
    chunks = [pa.array(part, pa.list_(kind)) for part in (rows[:half], [], rows[half:])]
    return one_chunk(pa.chunked_array(chunks, pa.list_(kind)))


def as_large(rows, kind):
    return pa.array(rows, pa.large_list(kind))


def as_dictionary(rows, kind):
    """Lists whose elements are dictionary-encoded, as Parquet readers may hand them out."""
    flat = pa.array([value for row in rows for value in row or []], kind).dictionary_encode()
    offsets = np.cumsum([0, *(len(row or []) for row in rows)]).tolist()
    starts = [None if row is None else start for row, start in zip(rows, offsets, strict=False)]
    return pa.ListArray.from_arrays(pa.array([*starts, offsets[-1]], pa.int32()), flat)


def as_hidden(rows, kind):
    """Null lists that lie over values all the same."""
    full = [[*row] if row is not None else [None] for row in rows]
    flat = pa.array([value for row in full for value in row], kind)
    offsets = pa.array(np.cumsum([0, *map(len, full)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array([row is None for row in rows], pa.bool_()))


HOLDERS = [as_sliced, as_chunked, as_large, as_dictionary, as_hidden]
INTEGER_ROWS = st.lists(st.none() | st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=5), max_size=6)
TEXT_ROWS = st.lists(st.none() | st.lists(st.none() | st.text(max_size=4), max_size=5), max_size=6)


@pytest.mark.parametrize("hold", HOLDERS)
@given(rows=INTEGER_ROWS, spec=TABLES, max_length=st.none() | st.integers(1, 5))
def test_a_bag_of_integers_is_read_as_row_by_row(hold, rows, spec, max_length):
    array = hold(rows, pa.int64())
    assert array.to_pylist() == rows
    found = bag(bag_of(max_length=max_length), spec, array, None)
    assert plain(found) == slow_bag(rows, None, spec, max_length)[0]
    assert found.weights is None


@pytest.mark.parametrize("hold", HOLDERS)
@given(rows=TEXT_ROWS, spec=TABLES, max_length=st.none() | st.integers(1, 5))
def test_a_bag_of_text_is_read_as_row_by_row(hold, rows, spec, max_length):
    found = bag(bag_of(max_length=max_length), spec, hold(rows, pa.string()), None)
    assert plain(found) == slow_bag(rows, None, spec, max_length)[0]


@pytest.mark.parametrize("hold", [as_sliced, as_chunked, as_large, as_hidden])
@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.int64()])
@given(rows=INTEGER_ROWS, max_length=st.none() | st.integers(1, 5))
def test_weights_go_with_their_ids(hold, kind, rows, max_length):
    """Where an id is null its weight goes with it, and need not be there."""
    weights = [row and [None if v is None else 10 * r + j for j, v in enumerate(row)] for r, row in enumerate(rows)]
    feature = bag_of(max_length=max_length, weights="w")
    found = bag(feature, MIX, as_sliced(rows, pa.int64()), hold(weights, kind))
    assert (plain(found), plain_weights(found)) == slow_bag(rows, weights, MIX, max_length)


def test_the_newest_of_a_bag_are_its_last_ids():
    found = bag(bag_of(max_length=2), MODULO, pa.array([[1, 2, 3], [4, None, 5, None], [6]]), None)
    assert plain(found) == [[2, 3], [4, 5], [6]]


def test_weights_beyond_what_float32_counts_exactly_are_rounded():
    found = bag(bag_of(weights="w"), MODULO, pa.array([[1]]), pa.array([[2**24 + 1]]))
    assert found.weights.tolist() == [2**24]


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([[1], [2, 3]], [[1.0], [1.0]], "here, column 'tags', row 1: 2 ids but 1 weights in 'w': write one weight per id"),
        ([[1], None], [[1.0], [1.0]], "here, column 'tags', row 1: 0 ids but 1 weights in 'w'"),
        ([[1, 2]], [None], "here, column 'tags', row 0: 2 ids but 0 weights in 'w'"),
        ([[1]], [[None]], "the weights in 'w' contain null, NaN or infinity"),
        ([[1]], [[math.nan]], "the weights in 'w' contain null, NaN or infinity"),
        ([[1]], [[math.inf]], "the weights in 'w' contain null, NaN or infinity"),
        ([[1]], [["1.5"]], "its weights, column 'w', are list<item: string>, not a list of numbers"),
        ([[1]], [1.0], "its weights, column 'w', are double, not a list of numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(ids, weights, message):
    weights = pa.array(weights, pa.list_(pa.float32()) if weights in ([[None]], [None]) else None)
    with pytest.raises(DataError, match=re.escape(message)):
        bag(bag_of(weights="w"), MIX, pa.array(ids), weights)


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.list_(pa.float64()), pa.list_(pa.list_(pa.int64()))])
def test_what_is_no_list_of_ids_is_no_bag(kind):
    assert not is_id_list(kind)
    with pytest.raises(DataError, match=re.escape(f"here: is {kind}, but a list of integers or strings is needed")):
        key_lists(pa.array([], kind), "here")


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=8), TABLES)
def test_a_category_has_bucket_0_for_null_alone(values, spec):
    expected = [0 if v is None else 1 + slow_bucket(v, spec.buckets - 1, spec) for v in values]
    array = pa.array([5, *values, None], pa.int64()).slice(1, len(values))
    for held in (array, array.dictionary_encode()):
        assert category(spec, held, "here").tolist() == expected
    words = [None if v is None else f"w{v}" for v in values]
    expected = [0 if w is None else 1 + slow_bucket(w, spec.buckets - 1, spec) for w in words]
    assert category(spec, pa.array(words, pa.string()), "here").tolist() == expected


def test_a_category_of_billions_of_buckets_does_not_wrap():
    """Beyond 2^31 rows, where int32 ends: with nulls, and at the size where one more than a bucket no longer fits."""
    for num_buckets in ((1 << 31) + 1, 1 << 32):
        spec = TableSpec(buckets=num_buckets, dim=2)
        values = list(range(200))
        expected = [1 + slow_bucket(value, num_buckets - 1, spec) for value in values]
        assert max(expected) > 1.9 * 2**30
        assert category(spec, pa.array(values), "here").tolist() == expected
        assert category(spec, pa.array([*values, None]), "here").tolist() == [*expected, 0]


def test_a_category_of_one_bucket_is_that_bucket():
    assert category(TableSpec(buckets=1, dim=2), pa.array([5, None]), "here").tolist() == [0, 0]


# What a pooled sum is divided by

WEIGHTED_ROWS = st.lists(st.lists(st.tuples(st.integers(0, 9), st.floats(0.125, 8, width=32)), max_size=4), max_size=5)


def divisors(feature: FeatureSpec, lists: Ragged) -> np.ndarray:
    """Those of the lists' rows; what stands behind them must be left alone."""
    out = np.full(len(lists) + 1, 7, np.float32)
    put_pooling_divisor(feature, lists, out)
    assert out[-1] == 7
    return out[:-1]


@given(WEIGHTED_ROWS, st.booleans(), st.sampled_from([1.0, 0.25, 3.0]))
def test_dividing_the_sum_gives_the_pooling_of_the_name(rows, is_weighted, scale):
    """Times the feature's scale."""
    lists = Ragged.from_lists([[v for v, _ in row] for row in rows])
    if is_weighted:
        lists = Ragged(lists.offsets, lists.values, np.array([w for row in rows for _, w in row], np.float32))
    weights = [[w if is_weighted else 1.0 for _, w in row] for row in rows]
    expected = {
        "sum": [1.0 for _ in rows],
        "mean": [math.fsum(row) if row else 1.0 for row in weights],
        "sqrtn": [math.sqrt(math.fsum(w * w for w in row)) if row else 1.0 for row in weights],
    }
    for pooling, divisor in expected.items():
        feature = bag_of(pooling=pooling, scale=scale)
        np.testing.assert_allclose(divisors(feature, lists), np.array(divisor) / scale, rtol=1e-6)


def test_weights_that_cancel_divide_by_one():
    lists = Ragged(np.array([0, 2, 4]), np.arange(4), np.array([1, -1, 0, 0], np.float32))
    assert divisors(bag_of(pooling="mean"), lists).tolist() == [1.0, 1.0]
    np.testing.assert_allclose(divisors(bag_of(pooling="sqrtn"), lists), [math.sqrt(2), 1.0])


def test_single_ids_are_not_divided():
    feature = build_feature(name="f", kind="id", table="t")
    assert divisors(feature, Ragged.singles(np.arange(3))).tolist() == [1, 1, 1]


# Numbers


def number(**changes) -> FeatureSpec:
    return build_feature(**{"name": "price", "kind": "number"} | changes)


def normalize(feature: FeatureSpec, array: pa.Array, statistics: Statistics, where: str) -> np.ndarray:
    return normalise_values(feature, *number_values(feature, array, where), statistics)


def learn_statistics(feature: FeatureSpec, arrays) -> Statistics:
    return learn_of_values(feature, (number_values(feature, array, where) for array, where in arrays))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("zscore", [(4.0 - 2) / 0.5, 0.0, (1.0 - 2) / 0.5, (-3.0 - 2) / 0.5]),
        ("minmax", [(4.0 + 3) / 7, 0.0, (1.0 + 3) / 7, 0.0]),
        ("log1p", [math.log(5), 0.0, math.log(2), -math.log(4)]),
        ("none", [4.0, 0.0, 1.0, -3.0]),
    ],
)
def test_numbers_are_normalised_and_null_is_zero_beside_its_indicator(kind, values):
    statistics = Statistics(mean=2.0, std=0.5, low=-3.0, high=4.0)
    array = pa.array([9.0, 4.0, None, 1.0, -3.0]).slice(1)
    found = normalize(number(normalize=kind), array, statistics, "here")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack([values, [0, 1, 0, 0]], axis=1), rtol=1e-6)


@pytest.mark.parametrize("kind", ["zscore", "minmax"])
def test_a_number_that_is_the_same_everywhere_is_zero(kind):
    statistics = learn_statistics(number(), [(pa.array([7, 7, None]), "here")])
    assert normalize(number(normalize=kind), pa.array([7]), statistics, "here").tolist() == [[0, 0]]
    nothing = learn_statistics(number(), [(pa.array([None, None], pa.int64()), "here")])
    assert normalize(number(normalize=kind), pa.array([None], pa.int64()), nothing, "here").tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1, None, 0], pa.int8()),
        pa.array([1, None, 0], pa.uint64()),
        pa.array([1, None, 0], pa.float32()),
        pa.array([True, None, False]),
        pa.array([decimal.Decimal("1.00"), None, decimal.Decimal(0)]),
    ],
)
def test_every_numeric_type_is_a_number(array):
    assert normalize(number(normalize="none"), array, Statistics(), "here").tolist() == [[1, 0], [0, 1], [0, 0]]
    check_kind(number(), array.type, "here")


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e39])
def test_what_float32_does_not_hold_is_named_or_taken_as_missing(odd):
    array = pa.array([1.0, None, odd, 2.0, odd])
    with pytest.raises(DataError, match=r"here: 2 of 5 numbers are NaN, infinite .* in row 2: .* nan: missing"):
        normalize(number(), array, Statistics(), "here")
    with pytest.raises(DataError, match=r"here: 2 of 5 numbers"):
        learn_statistics(number(), [(array, "here")])
    lenient = number(nan="missing", normalize="none")
    assert normalize(lenient, array, Statistics(), "here").tolist() == [[1, 0], [0, 1], [0, 1], [2, 0], [0, 1]]
    assert learn_statistics(lenient, [(array, "here")]) == Statistics(1.5, 0.5, 1.0, 2.0)


@given(st.lists(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=6), min_size=1, max_size=5), st.floats(-1e9, 1e9))
def test_statistics_are_those_of_all_parts_together(parts, level):
    """Also where the values lie far from zero, as times do."""
    parts = [[None if value is None else value + level for value in part] for part in parts]
    found = learn_statistics(number(), [(pa.array(part, pa.float64()), "here") for part in parts])
    values = np.array([value for part in parts for value in part if value is not None])
    if not values.size:
        assert found == Statistics()
        return
    assert (found.low, found.high) == (values.min(), values.max())
    np.testing.assert_allclose(found.mean, values.mean(), rtol=1e-12, atol=1e-9)
    exact = math.sqrt(math.fsum((v - math.fsum(values) / values.size) ** 2 for v in values) / values.size)
    if exact > 1e-3:
        np.testing.assert_allclose(found.std, exact, rtol=1e-6)


def test_statistics_keep_the_digits_of_large_numbers():
    times = [pa.array([1e9, 1e9 + 1] * 50), pa.array([1e9 + 3, 1e9 + 4] * 50)]
    assert learn_statistics(number(), [(part, "here") for part in times]) == Statistics(
        1e9 + 2, math.sqrt(2.5), 1e9, 1e9 + 4
    )


@pytest.mark.parametrize("array", [pa.array(["1"]), pa.array([[1.0]]), pa.array(["1"]).dictionary_encode()])
def test_what_is_no_number_is_refused(array):
    with pytest.raises(DataError, match=r"here: is .*, but feature 'price' is a number: cast it"):
        normalize(number(), array, Statistics(), "here")


# Types are looked at before anything is read


@pytest.mark.parametrize(
    ("kind", "column", "needed"),
    [
        ("id", pa.float64(), "integers or strings"),
        ("id", pa.list_(pa.int64()), "integers or strings"),
        ("category", pa.bool_(), "integers or strings"),
        ("bag", pa.int64(), "lists of integers or strings"),
        ("bag", pa.list_(pa.float32()), "lists of integers or strings"),
        ("number", pa.string(), "numbers"),
        ("number", pa.timestamp("us"), "numbers"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(kind, column, needed):
    feature = build_feature(name="f", kind=kind, column="c", table=None if kind == "number" else "t")
    message = f"here: column 'c' is {column}, but feature 'f' of kind '{kind}' needs {needed}:"
    with pytest.raises(DataError, match=re.escape(message)):
        check_kind(feature, column, "here")


def test_weights_of_the_wrong_type_are_refused_before_anything_is_read(tmp_path, write_dataset):
    table = pa.table({"tags": [[1]], "w": [["heavy"]]})
    split = Split(write_dataset(tmp_path / "d", items=table) / "items", "items")
    with pytest.raises(DataError, match=r"items, column 'tags': its weights, column 'w', are list<.*: string>"):
        check_side([bag_of(weights="w")], split)


# A table, whole

FEATURES = [
    build_feature(name="item_id", kind="id", table="item"),
    build_feature(name="brand", kind="category", column="maker", table="brand"),
    build_feature(name="tags", kind="bag", table="item", weights="tag_weights", max_length=2, pooling="mean"),
    build_feature(name="price", kind="number", normalize="none"),
]
ITEM_TABLES = {"item": MODULO, "brand": TableSpec(buckets=11, dim=2, hashing="modulo")}
TABLE = pa.table(
    {
        "item_id": [7, 8, 9],
        "maker": [3, None, 4],
        "tags": [[1, 2, 3], None, [4]],
        "tag_weights": [[9.0, 1.0, 3.0], [], [2.0]],
        "price": [1.5, None, 2.5],
    }
)


def test_a_table_is_transformed_feature_by_feature():
    columns = transform(FEATURES, ITEM_TABLES, {"price": Statistics()}, TABLE, "here")
    assert columns.num_rows == 3
    assert {name: plain(lists) for name, lists in columns.sparse.items()} == {
        "item_id": [[7], [8], [9]],
        "brand": [[4], [0], [5]],
        "tags": [[2, 3], [], [4]],
    }
    assert columns.sparse["tags"].weights.tolist() == [1, 3, 2]
    assert columns.numbers["price"].tolist() == [[1.5, 0], [0, 1], [2.5, 0]]


def test_lists_that_are_given_stand_for_a_column_that_is_not_read():
    feature = bag_of(max_length=2, pooling="sqrtn")
    given_lists = {"tags": Ragged.from_lists([[51, 52, 53], [], [4]])}
    columns = transform([feature], {"t": MODULO}, {}, TABLE.drop(["tags"]), "here", given_lists)
    assert plain(columns.sparse["tags"]) == [[2, 3], [], [4]]
    uncut = transform([feature], {"t": MODULO}, {}, TABLE.drop(["tags"]), "here", given_lists, uncut=True)
    assert plain(uncut.sparse["tags"]) == [[1, 2, 3], [], [4]]


def test_columns_are_taken_and_joined_row_by_row():
    columns = transform(FEATURES, ITEM_TABLES, {"price": Statistics()}, TABLE, "here")
    twice = Columns.concat([columns.take(np.array([2])), columns.take(np.array([0, 1, 2]))]).take(np.array([0, 3]))
    assert twice.num_rows == 2
    assert plain(twice.sparse["tags"]) == [[4], [4]] and twice.sparse["tags"].weights.tolist() == [2, 2]
    part = columns.slice(1, 3)
    assert part.num_rows == 2 and plain(part.sparse["tags"]) == [[], [4]]
    assert part.sparse["tags"].weights.tolist() == [2] and part.numbers["price"].tolist() == [[0, 1], [2.5, 0]]
    assert twice.numbers["price"].tolist() == [[2.5, 0], [2.5, 0]]


def test_an_error_names_the_column():
    table = TABLE.set_column(0, "item_id", pa.array([7, None, 9]))
    with pytest.raises(DataError, match=r"part-0, column 'item_id': 1 of 3 ids are null, the first in row 1"):
        transform(FEATURES, ITEM_TABLES, {"price": Statistics()}, table, "part-0")
