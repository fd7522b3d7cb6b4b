"""Every Arrow type with every kind of feature: the values of the plain type, or an error that names the column."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.arrow_types import plain_array, plain_type
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.hash_column import hash_column
from trec_twotower.data.features.transform import transform
from trec_twotower.data.held_out import HeldOut
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.evaluation.slices import column_of, parts_of
from trec_twotower.index import mask_of
from trec_twotower.inference.export import _about

# Values of each family, and its types: the first is the plain one that the others are compared with.
TEXTS = ["a", "bb", "a", "", "ø", "bb"]
INTEGERS = [1, 7, 1, 0, 100, 7]
LISTS = [["a", "bb"], [], ["ø"], ["bb", None, ""], None, ["a"]]
INSTANTS = [datetime(2024, 5, 3, 7, tzinfo=UTC) + timedelta(days=n, seconds=n) for n in range(6)]
UNITS = ("s", "ms", "us", "ns")


def lists_of(inner: pa.DataType) -> list[pa.DataType]:
    return [kind(inner) for kind in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)]


FAMILIES: dict[str, tuple[list[Any], list[pa.DataType]]] = {
    "text": (TEXTS, [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()),
                     pa.dictionary(pa.uint32(), pa.large_string(), ordered=True)]),
    "integer": (INTEGERS, [pa.int64(), pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(),
                           pa.uint64(), pa.dictionary(pa.int32(), pa.int64())]),
    "bool": ([True, False] * 3, [pa.bool_()]),
    "float": ([1.5, -2.0, 0.25, 8.0, 0.0, 3.5], [pa.float64(), pa.float32(), pa.float16(),
                                                 pa.dictionary(pa.int32(), pa.float64())]),
    "decimal": ([Decimal("1.50"), Decimal("-2.25")] * 3, [pa.decimal128(9, 2), pa.decimal32(9, 2), pa.decimal64(9, 2),
                                                          pa.decimal256(45, 2)]),
    "timestamp": (INSTANTS, [pa.timestamp(unit, zone) for zone in ("UTC", "Asia/Tokyo", None) for unit in UNITS]),
    "date": ([date(2024, 5, 3 + n) for n in range(6)], [pa.date32(), pa.date64()]),
    "texts": (LISTS, [*lists_of(pa.string()), *lists_of(pa.string_view()), *lists_of(pa.large_string()),
                      *lists_of(pa.dictionary(pa.int32(), pa.string()))]),
    "integers": ([[1, 7], [], [0], [7, None, 3], None, [1]], [*lists_of(pa.int64()), *lists_of(pa.uint16()),
                                                              *lists_of(pa.int32())]),
    "pairs of integers": ([[1, 7], [7, 0], None, [7, None], [3, 3], [1, 2]], [pa.list_(pa.int64()),
                                                                              pa.list_(pa.int64(), 2),
                                                                              pa.list_(pa.uint8(), 2)]),
    "pairs of texts": ([["a", "b"], ["b", ""], None, ["b", None], ["c", "c"], ["a", "a"]],
                       [pa.list_(pa.string()), pa.list_(pa.string(), 2), pa.list_(pa.string_view(), 2)]),
    "pairs of floats": ([[1.5, 2.0], [0.25, -4.0], None, [8.0, 0.5], [1.0, 1.0], [0.0, 2.5]],
                        [pa.list_(pa.float32()), pa.list_(pa.float32(), 2), pa.list_(pa.float64(), 2),
                         pa.list_(pa.float16(), 2), *lists_of(pa.float64()), *lists_of(pa.float16())]),
    "lists of decimals": ([[Decimal("1.50")], [], None] * 2, lists_of(pa.decimal128(9, 2))),
    "lists of instants": ([[INSTANTS[0]], [], None] * 2, lists_of(pa.timestamp("ns", "UTC"))),
    "lists of lists": ([[["a"], []], [], None] * 2, lists_of(pa.list_(pa.string()))),
    "lists of nothing": ([[], None] * 3, [*lists_of(pa.null()), pa.list_(pa.null(), 0)]),
    "nothing": ([None] * 6, [pa.null()]),
    "bytes": ([b"a", b"\xff", b""] * 2, [pa.binary(), pa.large_binary(), pa.binary_view()]),
    "bytes of one size": ([b"abcd"] * 6, [pa.binary(4)]),
    "times of day": ([time(7, 30)] * 6, [pa.time32("s"), pa.time64("ns")]),
    "spans of time": ([timedelta(hours=5)] * 6, [pa.duration("s"), pa.duration("ns")]),
    "structs": ([{"a": "x"}] * 6, [pa.struct([("a", pa.string())]), pa.struct([("a", pa.string_view())])]),
    "maps": ([[("a", 1)]] * 6, [pa.map_(pa.string(), pa.int64()), pa.map_(pa.string_view(), pa.int64())]),
}  # fmt: skip
OWN = {"buckets": 1000, "dim": 4}
KINDS: dict[str, tuple[FeatureSpec, set[str]]] = {  # a feature of each kind, and the families that fit it
    "id": (build_feature(name="x", kind="id", **OWN), {"text", "integer"}),
    "category": (build_feature(name="x", kind="category", **OWN), {"text", "integer"}),
    "vocabulary": (build_feature(name="x", kind="category", vocabulary="learned", **OWN), {"text", "integer"}),
    "cross": (build_feature(name="both", kind="cross", columns=("x", "item_id"), **OWN), {"text", "integer"}),
    "bag": (build_feature(name="x", kind="bag", **OWN),
            {"texts", "integers", "pairs of integers", "pairs of texts"}),
    "number": (build_feature(name="x", kind="number", normalize="none"), {"integer", "bool", "float", "decimal"}),
    "bins": (build_feature(name="x", kind="number", bins=(0.0, 1.0), dim=4), {"integer", "bool", "float", "decimal"}),
    "hour": (build_feature(name="x", kind="time", part="hour", dim=4),
             {"integer", "float", "decimal", "timestamp", "date"}),
    "age": (build_feature(name="x", kind="time", part="age", at="2025-01-01", normalize="none"),
            {"integer", "float", "decimal", "timestamp", "date"}),
    "text": (build_feature(name="x", kind="text", **OWN), {"text"}),
    "vector": (build_feature(name="x", kind="vector", size=2), {"pairs of floats"}),
}  # fmt: skip


def column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(kind) and kind.tz is None:
        values = [each and each.replace(tzinfo=None) for each in values]
    return pa.array(values, kind)


def sources(write_dataset, folder, array: pa.Array, feature: FeatureSpec) -> FeatureDataset:
    """A dataset whose items have `array` as column x, seen by one feature of it."""
    ids = pa.array([10 + n for n in range(len(array))])
    if not folder.is_dir():
        write_dataset(folder, train=pa.table({"user_id": ids, "item_id": ids}), items=pa.table(
            {"item_id": ids, "x": array}))  # fmt: skip
    user = build_feature(name="user_id", kind="id", buckets=9, dim=4)
    return FeatureDataset(Dataset(folder), Schema.build({}, (user,), (feature,)), "event")


def values_of(found) -> dict[str, Any]:
    sparse = {name: [lists.values[at].tolist() for at in map(slice, lists.offsets, lists.offsets[1:])]
              for name, lists in found.sparse.items()}  # fmt: skip
    return sparse | {name: np.asarray(number).tolist() for name, number in found.numbers.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_of_any_type_is_read_as_its_plain_type_or_refused_by_name(write_dataset, tmp_path, family):
    values, kinds = FAMILIES[family]
    expected: dict[str, Any] = {}
    for (number, kind), (name, (feature, families)) in product(enumerate(kinds), KINDS.items()):
        folder, array = tmp_path / str(number), column(values, kind)
        if family not in families:
            with pytest.raises((ConfigError, DataError)) as error:
                sources(write_dataset, folder, array, feature)
            assert f"{folder}/items" in str(error.value) and "'x'" in str(error.value), f"{kind}: {error.value}"
            continue
        found = values_of(sources(write_dataset, folder, array, feature).catalogue.columns)
        assert found == expected.setdefault(name, found), f"{name} of {kind} differs from {kinds[0]}"


@pytest.mark.parametrize("family", ["text", "integer", "float", "decimal", "timestamp", "date"])
def test_null_stays_null_in_every_type(write_dataset, tmp_path, family):
    values, kinds = FAMILIES[family]
    values = [None, *values[1:]]
    expected: dict[str, Any] = {}
    for (number, kind), (name, (feature, families)) in product(enumerate(kinds), KINDS.items()):
        if family not in families or name == "id":
            continue
        made = sources(write_dataset, tmp_path / str(number), column(values, kind), feature)
        found = values_of(made.catalogue.columns)
        assert found == expected.setdefault(name, found), f"{name} of {kind} differs from {kinds[0]}"
        assert found != values_of(
            sources(write_dataset, tmp_path / f"{number}-whole", column(FAMILIES[family][0], kind), feature)
            .catalogue.columns)  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kinds in (FAMILIES["text"][1], FAMILIES["integer"][1]) for kind in kinds],
                         ids=str)  # fmt: skip
def test_ids_of_any_type_find_each_other(write_dataset, tmp_path, kind):
    """Item ids, histories and positives in one type, and in that of the catalogue, name the same items."""
    is_text = pa.types.is_string(plain_type(kind)) or pa.types.is_large_string(plain_type(kind))
    ids = ["i0", "i1", "i2"] if is_text else [3, 4, 5]
    plain = pa.string() if is_text else pa.int64()
    rows = {"user_id": pa.array([1, 2, 3])}
    histories = [[ids[2], ids[0]], None, [ids[1]]]
    for number, (of_items, of_rows) in enumerate([(kind, kind), (plain, kind), (kind, plain)]):
        inner = of_rows.value_type if pa.types.is_dictionary(of_rows) else of_rows
        folder = write_dataset(
            tmp_path / str(number),
            train=pa.table({**rows, "item_id": pa.array(ids, of_rows),
                            "history": pa.array(histories, pa.list_(inner))}),
            valid=pa.table({**rows, "positives": pa.array([[each] for each in ids], pa.list_view(inner)),
                            "history": pa.array(histories, pa.large_list(inner))}),
            items=pa.table({"item_id": pa.array(ids[::-1], of_items)}),
        )  # fmt: skip
        table = TableSpec(buckets=100, dim=4)
        user = build_feature(name="history", kind="bag", table="item")
        item = build_feature(name="item_id", kind="id", table="item")
        made = FeatureDataset(Dataset(folder), Schema.build({"item": table}, (user,), (item,)), "event")
        assert made.item_counts().tolist() == [1, 1, 1]
        held_out = HeldOut.read(made, "valid")
        assert held_out.positives.values.tolist() == [2, 1, 0]
        assert [held_out.seen.slice(n, n + 1).values.tolist() for n in range(3)] == [[0, 2], [], [1]]
        assert made.catalogue.words(np.array([0]))[0]["item_id"] == ids[2]


@pytest.mark.parametrize("is_signed_catalogue", [True, False])
def test_ids_that_differ_in_sign_alone_are_not_taken_for_each_other(write_dataset, tmp_path, is_signed_catalogue):
    """-1 as int64 and 2^64 - 1 as uint64 have the same 64 bits, and so the same table row."""
    signed, unsigned = pa.array([-1, 5], pa.int64()), pa.array([2**64 - 1, 5], pa.uint64())
    items, rows = (signed, unsigned) if is_signed_catalogue else (unsigned, signed)
    user, item = build_feature(name="user_id", kind="id", **OWN), build_feature(name="item_id", kind="id", **OWN)
    schema = Schema.build({}, (user,), (item,))

    def read(name: str, ids: pa.Array, catalogue: pa.Array) -> FeatureDataset:
        train = pa.table({"user_id": [1] * len(ids), "item_id": ids})
        return FeatureDataset(
            Dataset(write_dataset(tmp_path / name, train=train, items=pa.table({"item_id": catalogue}))), schema,
            "event")  # fmt: skip

    with pytest.raises(DataError, match=r"train: column 'item_id' is u?int64, but 'item_id' in .*items is u?int64"):
        read("mixed", rows, items)
    assert read("alike", rows, rows).item_counts().tolist() == [1, 1]
    assert read("small", rows.slice(1), items.slice(1)).item_counts().tolist() == [1]


BESIDE = {  # a column next to a list of two ids: its types, of which the first is plain
    "weights": ([[1.0, 0.5]], [pa.list_(pa.float64()), pa.list_(pa.float64(), 2), *lists_of(pa.float16()),
                               pa.list_(pa.decimal128(5, 2)), pa.list_view(pa.decimal256(50, 2))]),
    "times": ([[1.7e9, 1.71e9]], [pa.list_(pa.float64()), *lists_of(pa.float64()), pa.list_(pa.float64(), 2),
                                  *lists_of(pa.int64()), pa.list_(pa.uint32(), 2), pa.list_(pa.decimal128(12, 1))]),
    "actions": ([["saw", "took"]], [pa.list_(pa.string()), *lists_of(pa.string_view()), pa.list_(pa.string(), 2),
                                    pa.list_(pa.dictionary(pa.int8(), pa.string()))]),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_columns_next_to_lists_of_ids_may_have_any_type(write_dataset, tmp_path, name):
    [cells], kinds = BESIDE[name]
    parts = {"weights": {"kind": "bag"}, "times": {"kind": "sequence", "max_length": 5}}
    parts["actions"] = parts["times"]
    feature = build_feature(name="history", table="item", **parts[name], **{name: "x"})
    expected = None
    for number, kind in enumerate(kinds):
        inner = kind.value_type
        cast = Decimal if pa.types.is_decimal(inner) else int if pa.types.is_integer(inner) else lambda value: value
        x = pa.array([None, [cast(cell) for cell in cells]], kind)
        train = pa.table({"user_id": [1, 2], "item_id": [5, 6], "history": pa.array([None, [5, 6]]), "x": x})
        folder = write_dataset(tmp_path / str(number), train=train, items=pa.table({"item_id": [5, 6]}))
        item = build_feature(name="item_id", kind="id", table="item")
        made = FeatureDataset(
            Dataset(folder), Schema.build({"item": TableSpec(buckets=9, dim=4)}, (feature,), (item,)), "event"
        )
        split = made.dataset.train
        table = split.read(split.row_groups[0], made.user_columns(), dictionaries=True)
        columns = made.user_features(table, "here")
        found = values_of(columns), [lists.weights is None or lists.weights.tolist()
                                     for lists in columns.sparse.values()]  # fmt: skip
        expected = expected or found
        assert found == expected, f"{name} of {kind} differ from {kinds[0]}"


# Held-out parts


@pytest.mark.parametrize(
    "nothing",
    [pa.nulls(2), pa.array([[], None]), pa.array([[], []], pa.large_list_view(pa.null()))],
    ids=lambda array: str(array.type),
)
def test_a_part_where_nobody_has_a_history_yet_is_read(write_dataset, tmp_path, nothing):
    folder = write_dataset(
        tmp_path / "data",
        train=pa.table({"user_id": [1], "item_id": ["a"], "history": [["b"]], "age": [20.0], "country": ["no"]}),
        valid=pa.table({"user_id": [1, 2], "item_id": ["a", "b"], "history": nothing, "age": pa.nulls(2),
                        "country": pa.nulls(2)}),
        items=pa.table({"item_id": ["a", "b"]}),
    )  # fmt: skip
    user = (build_feature(name="history", kind="bag", table="item"), build_feature(name="age", kind="number"),
            build_feature(name="country", kind="category", **OWN))  # fmt: skip
    item = build_feature(name="item_id", kind="id", table="item")
    made = FeatureDataset(Dataset(folder), Schema.build({"item": TableSpec(buckets=9, dim=4)}, user, (item,)), "event")
    held_out = HeldOut.read(made, "valid")
    assert held_out.user.sparse["history"].values.tolist() == [] and held_out.seen.values.tolist() == []
    assert held_out.user.numbers["age"].tolist() == [[0, 1], [0, 1]]
    assert held_out.user.sparse["country"].values.tolist() == [0, 0]


def test_a_part_with_positives_of_no_type_has_nothing_to_evaluate(write_dataset, tmp_path):
    folder = write_dataset(
        tmp_path / "data",
        train=pa.table({"user_id": [1], "item_id": [7]}),
        valid=pa.table({"user_id": [1], "positives": pa.array([[]])}),
        items=pa.table({"item_id": [7]}),
    )
    user, item = build_feature(name="user_id", kind="id", **OWN), build_feature(name="item_id", kind="id", **OWN)
    with pytest.raises(DataError, match=f"{folder}/valid: no row has a held-out item"):
        HeldOut.read(FeatureDataset(Dataset(folder), Schema.build({}, (user,), (item,)), "event"), "valid")


# Plain arrays


def test_plain_arrays_hold_the_same_values_also_in_slices():
    draw = random.Random(1)
    texts = [draw.choice(["a", "bb", None, ""]) for _ in range(30)]
    lists = [draw.choice([None, [], draw.choices(texts, k=draw.randrange(4))]) for _ in range(30)]
    inner = [pa.string(), pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    arrays = [pa.array(texts, kind) for kind in inner]
    arrays += [pa.array(lists, kind) for each in inner for kind in lists_of(each)]
    arrays += [pa.array([[each, each] for each in lists], kind) for kind in lists_of(pa.list_view(pa.string_view()))]
    arrays += [pa.array([None if each is None else (each + [None] * 4)[:4] for each in lists], pa.list_(kind, 4))
               for kind in inner]  # fmt: skip
    arrays += [pc.run_end_encode(pa.array(sorted(texts, key=str))), pc.run_end_encode(pa.array([1, 1, None, None, 2]))]
    arrays += [
        pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1]), pa.array(["a", "b"], pa.string_view())),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1]), pa.array(["a", None])),
        pa.ListViewArray.from_arrays(pa.array([4, 0, 2, 0]), pa.array([1, 3, 2, 0]), pa.array([1, 2, 3, 4, 5])),
        pa.array([{"a": "x", "b": [None, "c"]}, None, {"a": None, "b": None}],
                 pa.struct([("a", pa.string_view()), ("b", pa.list_view(pa.string()))])),
        pa.array([[("a", "1"), ("b", None)], None, []], pa.map_(pa.string_view(), pa.string_view())),
        pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None, "{}"])),
    ]  # fmt: skip
    for array in arrays:
        for part in (array, array.slice(1), array.slice(2, 3), array.slice(len(array))):
            storage = part.storage if isinstance(part, pa.ExtensionArray) else part
            for keeps_dictionaries in (False, True):
                found = plain_array(part, keeps_dictionaries=keeps_dictionaries)
                found.validate(full=True)
                assert found.to_pylist() == storage.to_pylist(), f"{array.type}"
                assert keeps_dictionaries or found.type == plain_type(array.type), f"{array.type}"


@pytest.mark.parametrize(
    "array",
    [
        pc.run_end_encode(pa.array(["a", "a", "b"])),
        pa.DictionaryArray.from_arrays(pa.array([0, 0, 1]), pa.array(["a", "b"], pa.string_view())),
        pa.array(["a", "a", "b"], pa.string_view()),
    ],
    ids=lambda array: str(array.type),
)
def test_offline_hashing_reads_types_that_parquet_cannot_hold(array):
    feature = build_feature(name="x", kind="category", **OWN)
    assert hash_column(feature, array).to_pylist() == hash_column(feature, pa.array(["a", "a", "b"])).to_pylist()


# Names


def test_features_read_the_column_of_exactly_their_name(write_dataset, tmp_path):
    ids = pa.array([1, 2])
    items = pa.table({"item_id": ids, "brand": ["a", "b"], "Brand": ["c", "d"], "BRAND": ["e", "f"]})
    folder = write_dataset(tmp_path / "data", train=pa.table({"user_id": ids, "item_id": ids}), items=items)
    user = build_feature(name="user_id", kind="id", **OWN)
    for name in ("brand", "Brand", "BRAND"):
        feature = build_feature(name="f", kind="category", column=name, **OWN)
        found = FeatureDataset(Dataset(folder), Schema.build({}, (user,), (feature,)), "event").catalogue.columns
        expected = transform([feature], {"f": feature.own_table}, {}, items.select([name]), "here")
        assert found.sparse["f"].values.tolist() == expected.sparse["f"].values.tolist()
    feature = build_feature(name="f", kind="category", column="bRand", **OWN)
    with pytest.raises(ConfigError, match=r"has no column 'bRand'.*nearest"):
        FeatureDataset(Dataset(folder), Schema.build({}, (user,), (feature,)), "event")


def test_two_columns_of_one_name_are_refused(write_dataset, tmp_path):
    ids = pa.array([1, 2])
    items = pa.Table.from_arrays([ids, pa.array(["a", "b"]), pa.array(["c", "d"])], ["item_id", "brand", "brand"])
    folder = write_dataset(tmp_path / "data", train=pa.table({"user_id": ids, "item_id": ids}), items=items)
    with pytest.raises(DataError, match=r"items/part-0.parquet has 2 columns named 'brand'"):
        Dataset(folder).split("items")


# Columns that no feature reads


@pytest.mark.parametrize("family", [*FAMILIES, "nanoseconds", "uuids"])
def test_columns_that_nothing_learns_from_are_shown_filtered_and_exported(write_dataset, tmp_path, family):
    """In any type; where one cannot be filtered or sliced by, the error names the column."""
    more = {
        "nanoseconds": [pa.array([1_700_000_000_000_000_001 + n for n in range(6)], kind)
                        for kind in (pa.timestamp("ns"), pa.timestamp("ns", "UTC"), pa.duration("ns"))],
        "uuids": [pa.array([bytes([n] * 16) for n in range(6)], pa.binary(16)).cast(pa.uuid())],
    }  # fmt: skip
    arrays = more[family] if family in more else [column(FAMILIES[family][0], kind) for kind in FAMILIES[family][1]]
    shown = None
    for number, array in enumerate(arrays):
        if array.type == pa.list_(pa.null(), 0):  # pyarrow writes it, and cannot read it again
            continue
        feature = build_feature(name="item_id", kind="id", **OWN)
        made = sources(write_dataset, tmp_path / str(number), array, feature)
        split = made.dataset.items
        words = [row["x"] for row in made.catalogue.words(np.array([5, 0, 3]))]
        assert len(words) == 3 and len(made.catalogue.words(np.array([0]))[0]) == 2
        if family in ("text", "integer", "bool", "float", "texts", "integers", "pairs of texts", "pairs of integers"):
            values = FAMILIES[family][0]
            assert words == [values[5], values[0], values[3]]
            shown = shown or words
            assert words == shown
        exported = _about(split, ["x"], 2, 5)
        assert len(exported) == 3 and exported.schema.types == [split.columns["x"]]
        for use in (
            lambda split=split: parts_of(column_of(split, "x", "item.x")),
            lambda split=split: mask_of(split.table(["x"])["x"].combine_chunks(), ["a"], "x"),
        ):
            try:
                use()
            except ConfigError as error:
                assert "'x'" in str(error)
