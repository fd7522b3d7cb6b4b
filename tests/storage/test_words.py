"""Text whose bytes are no UTF-8, from the files to the last page that people read."""

from __future__ import annotations

import json
from datetime import UTC, datetime, time, timedelta

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.shop import SHOP_CONFIG
from trec_twotower.storage.arrow_values import EXACT, exact_array, python_rows, python_value, python_values

NOVEMBER = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
BYTES = st.binary(max_size=4) | st.text(max_size=4).map(str.encode)


def text_of(values: list[bytes | None]) -> pa.Array:
    """A column of text that holds these bytes, as a Parquet file gives it: nothing looks at them."""
    held = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(held), held.buffers())


def latin(column: pa.Array | pa.ChunkedArray, *, every: int = 1) -> pa.Array:
    """Each `every`th text with an e acute as Latin-1 has it in place of its first letter "e"."""

    def spoiled(place: int, text: str | None) -> bytes | None:
        return None if text is None else text.encode().replace(b"e", b"\xe9", 0 if place % every else 1)

    return text_of([spoiled(place, text) for place, text in enumerate(column.to_pylist())])


@given(st.lists(st.none() | BYTES, max_size=5), st.integers(0, 2))
def test_values_are_those_bytes_decoded_one_by_one(values, skipped):
    text = text_of([*[b"left out"] * skipped, *values]).slice(skipped)
    wanted = [None if value is None else value.decode("utf-8", "replace") for value in values]
    for array in (text, pa.chunked_array([text]), text.cast(pa.large_string()), text.dictionary_encode()):
        assert python_values(array) == wanted
    assert [python_value(text, row) for row in range(len(values))] == wanted
    offsets = pa.array([0, 0, len(values)], pa.int32())
    lists = pa.ListArray.from_arrays(offsets, text, mask=pa.array([True, False]))
    both = pa.table({"list": lists, "struct": pa.StructArray.from_arrays([lists, lists], ["a", "b"])})
    empty, full = {"a": None, "b": None}, {"a": wanted, "b": wanted}
    assert python_rows(both) == [{"list": None, "struct": empty}, {"list": wanted, "struct": full}]


@given(st.lists(BYTES, max_size=5))
def test_exact_words_come_back_byte_by_byte(values):
    words = json.loads(json.dumps(python_values(text_of(values), EXACT)))
    assert exact_array(words).cast(pa.binary()).to_pylist() == values
    assert exact_array([3, -1]).equals(pa.array([3, -1]))


@pytest.fixture
def spoiled_tables(shop_tables) -> dict[str, pa.Table]:
    """The shop, whose green and red things, titles, users and countries hold Latin-1."""
    tables = dict(shop_tables)
    for name, table in shop_tables.items():
        for column in ("item_id", "user_id", "colour", "title", "country"):
            if column in table.column_names:
                place = table.column_names.index(column)
                every = 2 if column == "title" else 1
                table = table.set_column(place, column, latin(table[column], every=every))
        for column in ("history", "positives", "tags"):
            if column in table.column_names:
                lists = table[column].combine_chunks()
                flat = latin(lists.flatten())
                made = pa.ListArray.from_arrays(lists.offsets, flat, mask=lists.is_null())
                table = table.set_column(table.column_names.index(column), column, made)
        tables[name] = table
    return tables


CONFIG = SHOP_CONFIG.replace(
    "{name: colour, kind: category, buckets: 16, dim: 4}",
    "{name: colour, kind: category, vocabulary: learned, buckets: 16, dim: 4}\n"
    "  - {name: title, kind: text, characters: [3, 4], buckets: 64, dim: 4}",
)


def test_the_whole_way_goes_through_bytes_that_are_no_utf8(tmp_path, write_dataset, spoiled_tables, cli):
    data, config, run = tmp_path / "shop", tmp_path / "shop.yaml", tmp_path / "run"
    write_dataset(data, **spoiled_tables)
    config.write_text(CONFIG.replace("dataset: shop", f"dataset: {data}"))
    calls = (
        ("train", config, f"run_dir={run}"),
        ("features", config),
        ("export", run),
        ("index", run),
        ("evaluate", run, "--slice", "item.colour", "--slice", "item.title", "--slice", "user.country"),
        ("report", run, "--colour", "colour"),
    )
    for call in calls:
        said = cli(*call)
        assert said.code == 0, said.err
    learned = json.loads((run / "statistics.json").read_text())["numbers"]["item:colour"]["words"]
    # The colours are ten items each: the words by their bytes, of which "r\xe9d" is that of red.
    assert sorted(word.encode(errors="surrogateescape") for word in learned) == sorted(
        [b"r\xe9d", b"gr\xe9en", b"blu\xe9", b"black"]
    )
    evaluated = json.loads((run / "evaluation.json").read_text())
    parts = set(evaluated["slices"]["item.colour"])
    assert {"r\ufffdd", "gr\ufffden", "blu\ufffd", "black"} <= parts
    assert "r\ufffdd" in (run / "report.html").read_text()
    said = cli("recommend", run, "--user", b"us\xe9r-2".decode(errors="surrogateescape"))  # as a shell's argument comes
    assert said.code == 0 and "us\ufffdr-2" in said.out, said.err
    assert "r\ufffdd-" in said.out or "gr\ufffden-" in said.out or "blu\ufffd-" in said.out


def test_errors_name_things_whose_bytes_are_no_utf8(tmp_path, write_dataset, spoiled_tables, cli):
    items = spoiled_tables["items"]
    for number, (part, table, wanted) in enumerate(
        (
            ("items", pa.concat_tables([items, items.slice(3, 1)]), "item_id 'r\ufffdd-3' is in rows 3 and 40"),
            ("items", items.slice(1), "item 'r\ufffdd-0' is not in the catalogue"),
            ("users", spoiled_tables["users"].slice(1), "user 'us\ufffdr-0' is not in"),
        )
    ):
        data, config = tmp_path / f"shop-{number}", tmp_path / f"{number}.yaml"
        write_dataset(data, **{**spoiled_tables, part: table})
        config.write_text(CONFIG.replace("dataset: shop", f"dataset: {data}"))
        said = cli("train", config, f"run_dir={tmp_path / str(number)}")
        assert said.code == 3 and wanted in said.mistake, said.err


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns", "UTC")), [NOVEMBER, None]),
        (pa.array([[1_700_000_000_000_000_001], None], pa.list_(pa.timestamp("ns", "UTC"))), [[NOVEMBER], None]),
        (pa.array([{"at": 1_700_000_000_000_000_001}], pa.struct([("at", pa.timestamp("ns", "UTC"))])),
         [{"at": NOVEMBER}]),
        (pa.array([5_999], pa.duration("ns")), [timedelta(microseconds=5)]),
        (pa.array([5_999], pa.time64("ns")), [time(microsecond=5)]),
        (pa.array([253_402_300_800], pa.timestamp("s")), ["10000-01-01 00:00:00"]),
        (pa.array([1], pa.timestamp("s", "Nowhere/Land")), [1]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)  # fmt: skip
def test_times_that_python_cannot_hold_are_cut_or_become_text(array, expected):
    """Nanoseconds as pandas writes them, years beyond 9999, and zones that are unknown here."""
    assert python_values(array) == expected
    assert python_values(pa.chunked_array([array, array])) == [*expected, *expected]


def test_a_time_that_no_unit_holds_is_no_other_time():
    for array in (pa.array([2**62], pa.timestamp("s", "UTC")), pa.array([-(2**31)], pa.date32())):
        [value] = python_values(array)
        assert isinstance(value, str | int)
