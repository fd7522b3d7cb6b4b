"""`prepare events` reads every value as it is written: no two become one, and what is ambiguous is refused."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trec_twotower.data.sources import prepare
from trec_twotower.errors import ConfigError, DataError

HEADER = "user_id,item_id,timestamp"
SAMPLE = 20_480  # rows that DuckDB would look at to guess types


def write(path: Path, *lines: str, header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def write_json(path: Path, objects: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return path


def read(folder: Path, part: str = "train", **options: Any) -> pa.Table:
    """A part of the dataset. Each user of these logs has one or two events, so that all are in train."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    prepare("events", folder / "out", given, overwrite=True)
    return pq.read_table(folder / "out" / part)


def refusal(kind: type[Exception], folder: Path, **options: Any) -> str:
    """What the error says; nothing half written is left."""
    with pytest.raises(kind) as error:
        read(folder, **options)
    assert not list(folder.glob(".out*"))
    return str(error.value)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "spelled",
    [
        ["2024-10-03", "2024-10-04"],
        ["10-11-12", "01-02-03"],
        ["12:30:00", "09:00:00"],
        ["1.10", "1.1", "2.0"],
        ["1E5", "100000", "2E7"],
        ["true", "TRUE", "false"],
        ["1_000", "1000"],
        ["007", "7", "0070"],
        ["+7", "7", "-0", "0"],
        ["0x1F", "31"],
        [" 7", "7", "7 "],
        ["NaN", "nan", "inf"],
        ["NULL", "null", "NA"],
        ["123456789012345678901234567890", "123456789012345678901234567891"],
    ],
    ids=lambda spelled: spelled[0],
)
def test_ids_and_categories_of_csv_stay_as_they_are_spelled(tmp_path, spelled):
    lines = [f"{user},{text},{user}" for user, text in enumerate(spelled)]
    assert read(tmp_path, events=write(tmp_path / "log.csv", *lines))["item_id"].to_pylist() == spelled
    lines = [f"{user},5,{user},{text}" for user, text in enumerate(spelled)]
    log = write(tmp_path / "log.csv", *lines, header=f"{HEADER},kind")
    assert read(tmp_path, events=log, context=["kind"])["kind"].to_pylist() == spelled


def test_plain_integers_are_int64_to_both_ends(tmp_path):
    ids = [-(2**63), -1, 0, 12, 2**63 - 1]
    log = write(tmp_path / "log.csv", *(f"{user},{item},{user}" for user, item in enumerate(ids)))
    table = read(tmp_path, events=log)
    assert table.schema.field("item_id").type == pa.int64() and table["item_id"].to_pylist() == ids


def test_an_id_that_comes_late_is_not_bent_to_the_type_of_the_others(tmp_path, capsys):
    lines = [f"{user},{user % 90 + 100},{user}" for user in range(SAMPLE + 100)]
    late = ["00123", "12.7"]
    log = write(tmp_path / "log.csv", *lines, *(f"{len(lines) + at},{text},9" for at, text in enumerate(late)))
    items = read(tmp_path, events=log)["item_id"].to_pylist()
    assert items[-2:] == late and items[:2] == ["100", "101"]
    assert "'item_id' are read as text, because 2 of 20,582" in capsys.readouterr().err


def test_ids_are_text_in_all_files_if_they_are_in_one(tmp_path):
    write(tmp_path / "parts" / "1.csv", "1,0155061224,1", "2,446520802,2")
    write(tmp_path / "parts" / "2.csv", "3,034545104X,3")
    items = read(tmp_path, events=tmp_path / "parts")["item_id"].to_pylist()
    assert items == ["0155061224", "446520802", "034545104X"]


@pytest.mark.parametrize("is_parquet", [False, True])
def test_ids_are_text_in_the_events_if_they_are_in_the_catalogue(tmp_path, is_parquet, capsys):
    log = write(tmp_path / "log.csv", "1,5,1", "2,6,2")
    if is_parquet:
        log = tmp_path / "log.parquet"
        pq.write_table(pa.table({"user_id": [1, 2], "item_id": [5, 6], "timestamp": [1, 2]}), log)
    items = write(tmp_path / "items.csv", "5,five", "6,six", "B00X,book", header="item_id,title")
    assert read(tmp_path, events=log, items=items)["item_id"].to_pylist() == ["5", "6"]
    assert dict(zip(*pq.read_table(tmp_path / "out/items").to_pydict().values(), strict=True))["5"] == "five"
    assert "ids are text in all tables, because those of 'item_id' in items" in capsys.readouterr().err


def test_declared_ids_of_two_types_are_refused_unless_the_options_say_one(tmp_path):
    log, items = tmp_path / "log.parquet", tmp_path / "items.parquet"
    pq.write_table(pa.table({"user_id": [1, 2], "item_id": [5, 6], "timestamp": [1, 2]}), log)
    pq.write_table(pa.table({"item_id": ["5", "6", "06"]}), items)
    message = refusal(DataError, tmp_path, events=log, items=items)
    assert "'item_id' is VARCHAR, but the events hold BIGINT" in message and "types.item_id=text" in message
    assert read(tmp_path, events=log, items=items, types={"item_id": "text"})["item_id"].to_pylist() == ["5", "6"]


def test_files_that_declare_two_types_for_a_column_are_named(tmp_path):
    (tmp_path / "parts").mkdir()
    for name, item in (("a", 7), ("b", "007")):
        table = pa.table({"user_id": [1 if name == "a" else 2], "item_id": [item], "timestamp": [1]})
        pq.write_table(table, tmp_path / "parts" / f"{name}.parquet")
    message = refusal(DataError, tmp_path, events=tmp_path / "parts")
    assert "int64 in" in message and "a.parquet, but string in" in message and "types.item_id=text" in message
    both = read(tmp_path, events=tmp_path / "parts", types={"item_id": "text"})
    assert both["item_id"].to_pylist() == ["7", "007"]


def test_ids_written_as_floats_are_the_integers_if_all_of_them_are(tmp_path, capsys):
    log = write(tmp_path / "log.csv", "17850.0,a,1", "-3.0,b,2", "0.0,a,3")
    assert read(tmp_path, events=log)["user_id"].to_pylist() == [-3, 0, 17850]
    assert "'user_id' are all written as floats" in capsys.readouterr().err
    assert read(tmp_path, events=log, types={"user_id": "text"})["user_id"].to_pylist() == ["-3.0", "0.0", "17850.0"]


def test_ids_written_both_ways_are_refused_with_the_options_that_decide(tmp_path):
    log = write(tmp_path / "log.csv", "17850.0,a,1", "17850,b,2")
    message = refusal(DataError, tmp_path, events=log)
    assert "as floats in 1 rows (such as 17850.0) and as integers in 1:" in message
    assert read(tmp_path, events=log, types={"user_id": "integer"})["user_id"].to_pylist() == [17850, 17850]
    assert read(tmp_path, events=log, types={"user_id": "text"})["user_id"].to_pylist() == ["17850", "17850.0"]


def test_float_ids_of_parquet_are_integers_or_refused(tmp_path):
    log = tmp_path / "log.parquet"

    def write_ids(ids: list[Any], kind: pa.DataType) -> None:
        table = {"user_id": list(range(len(ids))), "item_id": pa.array(ids, kind), "timestamp": list(range(len(ids)))}
        pq.write_table(pa.table(table), log)

    for ids, kind in (([3.0, 7.0], pa.float64()), ([decimal.Decimal(3), decimal.Decimal(7)], pa.decimal128(20, 0))):
        write_ids(ids, kind)
        assert read(tmp_path, events=log)["item_id"].to_pylist() == [3, 7]
    for ids, shown in (([3.0, 7.5], "7.5"), ([3.0, 2.0**60], "1.15")):
        write_ids(ids, pa.float64())
        message = refusal(DataError, tmp_path, events=log)
        assert "'item_id' is DOUBLE" in message and shown in message
    write_ids([3.0, 7.5], pa.float64())
    assert read(tmp_path, events=log, types={"item_id": "text"})["item_id"].to_pylist() == ["3", "7.5"]
    write_ids([3.0, float("nan")], pa.float64())
    assert "row 1 (counted from 0): 'item_id' is null" in refusal(DataError, tmp_path, events=log)
    assert read(tmp_path, events=log, where="item_id IS NOT NULL")["item_id"].to_pylist() == [3]


def test_unsigned_ids_of_2_63_and_more_stay_unsigned(tmp_path):
    ids = [2**63, 2**64 - 1, 5]
    rows = [{"user_id": user, "item_id": item, "timestamp": user} for user, item in enumerate(ids)]
    columns = {"user_id": [0, 1, 2], "item_id": pa.array(ids, pa.uint64()), "timestamp": [0, 1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    write_json(tmp_path / "log.jsonl", rows)
    write(tmp_path / "log.csv", *(f"{row['user_id']},{row['item_id']},{row['timestamp']}" for row in rows))
    for name in ("log.parquet", "log.jsonl", "log.csv"):
        items = read(tmp_path, "items", events=tmp_path / name)["item_id"]
        assert items.type == pa.uint64() and items.to_pylist() == sorted(ids), name
    write_json(tmp_path / "log.jsonl", [*rows, {"user_id": 9, "item_id": -1, "timestamp": 1}])
    assert "no integer type of 64 bits" in refusal(DataError, tmp_path, events=tmp_path / "log.jsonl")


def test_json_ids_stay_text_or_integers_and_other_numbers_are_refused(tmp_path, capsys):
    def log(*ids: Any) -> Path:
        rows = [{"user_id": user, "item_id": item, "timestamp": user} for user, item in enumerate(ids)]
        return write_json(tmp_path / "log.jsonl", rows)

    assert read(tmp_path, events=log("007", "7"))["item_id"].to_pylist() == ["007", "7"]
    assert read(tmp_path, events=log("2024-01-01", "2024-01-02"))["item_id"].to_pylist() == ["2024-01-01", "2024-01-02"]
    assert "12.7 is neither" in refusal(DataError, tmp_path, events=log(*range(SAMPLE + 10), 12.7))
    assert read(tmp_path, events=log(7, "007"))["item_id"].to_pylist() == ["7", "007"]
    assert "'item_id' are of several types of JSON" in capsys.readouterr().err


# ---------------------------------------------------------------- features


@pytest.mark.parametrize(
    ("spelled", "values"),
    [
        (["1", "-2", ""], [1, -2, None]),
        (["2.50", "3.00"], [2.5, 3.0]),  # as many places everywhere
        (["3", "2.75"], [3.0, 2.75]),  # no zero at the end
        (["3.0", "2.75"], [3.0, 2.75]),  # as Python and pandas write floats
        (["0.1", "1e-05"], [0.1, 1e-05]),
        (["1.10", "1.1"], ["1.10", "1.1"]),
        (["00501", "10001"], ["00501", "10001"]),
        (["1,5", "2"], ["1,5", "2"]),
        (["9223372036854775808", "1"], ["9223372036854775808", "1"]),
        (["2024-01-31", "2024-02-01"], ["2024-01-31", "2024-02-01"]),
        (["true", "false"], ["true", "false"]),
        (["", ""], [None, None]),
    ],
)
def test_a_feature_of_csv_is_what_all_of_its_values_are(tmp_path, spelled, values):
    lines = [f'{user},5,{user},"{text}"' if text else f"{user},5,{user}," for user, text in enumerate(spelled)]
    log = write(tmp_path / "log.csv", *lines, header=f"{HEADER},x")
    assert read(tmp_path, events=log, context=["x"])["x"].to_pylist() == values


def test_values_that_come_late_count_for_the_type(tmp_path):
    items = [{"item_id": item, "price": 3} for item in range(SAMPLE + 50)]
    for late in items[-10:]:
        late |= {"price": 2.5, "brand": "acme"}
    log = write_json(tmp_path / "log.jsonl", [{"user_id": 1, "item_id": SAMPLE + 49, "timestamp": 1}])
    path = write_json(tmp_path / "items.jsonl", items)
    made = read(tmp_path, "items", events=log, items=path).to_pylist()
    assert {item["price"] for item in made[-10:]} == {2.5} and made[-1]["brand"] == "acme" and made[0]["brand"] is None
    lines = [f"{item['item_id']},{item['price']}" for item in items]
    path = write(tmp_path / "items.csv", *lines, header="item_id,price")
    assert read(tmp_path, "items", events=log, items=path)["price"].to_pylist()[-10:] == [2.5] * 10


@pytest.mark.parametrize(
    ("spelled", "note"),
    [
        (["1.10", "1.1"], "types.x=number reads numbers"),
        (["1.5", "NaN"], "null='NaN' reads that word as null"),
        (["2,75", "1"], "with decimal=comma reads numbers"),
    ],
)
def test_a_column_of_numbers_that_is_read_as_text_is_reported(tmp_path, capsys, spelled, note):
    lines = [f'{user},5,{user},"{text}"' for user, text in enumerate(spelled)]
    log = write(tmp_path / "log.csv", *lines, header=f"{HEADER},x")
    assert read(tmp_path, events=log, context=["x"])["x"].to_pylist() == spelled
    assert note in capsys.readouterr().err


def test_types_declare_what_a_column_is(tmp_path):
    header = f"{HEADER},zip,price,flag,released,seen"
    lines = ["1,5,1,501,1.10,yes,2024-01-31T10:00:00+02:00,31/01/2024", "2,6,2,00501,1.1,0,2024-02-01,01/02/2024"]
    types = {"zip": "integer", "price": "number", "flag": "boolean", "released": "time", "seen": "%d/%m/%Y"}
    log = write(tmp_path / "log.csv", *lines, header=header)
    made = read(tmp_path, events=log, context=list(types), types=types)
    assert made["zip"].to_pylist() == [501, 501] and made["price"].to_pylist() == [1.1, 1.1]
    assert made["flag"].to_pylist() == [True, False]
    day = datetime.datetime
    assert made["released"].to_pylist() == [day(2024, 1, 31, 8), day(2024, 2, 1)]
    assert made["seen"].to_pylist() == [day(2024, 1, 31), day(2024, 2, 1)]
    assert read(tmp_path, events=log, context=["zip"], types={"zip": "text"})["zip"].to_pylist() == ["501", "00501"]


def test_values_that_are_not_of_their_declared_type_are_named(tmp_path):
    log = write(tmp_path / "log.csv", "1,5,1,3", "2,6,2,many", header=f"{HEADER},x")
    for options in ({"context": ["x"], "types": {"x": "number"}}, {"weight": "x"}, {"rating": "x", "min_rating": 1}):
        message = refusal(DataError, tmp_path, events=log, **options)
        assert "log.csv, line 3: 'x' is many, the first of 1 such rows" in message and "null=WORD" in message
    assert "nearest: 'x'" in refusal(ConfigError, tmp_path, events=log, types={"xx": "text"})
    message = refusal(ConfigError, tmp_path, events=log, types={"item_id": "number"})
    assert "this column holds ids, which are text or integer" in message
    assert "a type is text" in refusal(ConfigError, tmp_path, events=log, types={"x": "float"})


def test_null_words_are_null_everywhere(tmp_path):
    log = write(tmp_path / "log.csv", "1,5,1,NA,2.5", r"2,6,2,b,\N", header=f"{HEADER},x,y")
    made = read(tmp_path, events=log, context=["x", "y"], null=["NA", r"\N"])
    assert made["x"].to_pylist() == [None, "b"] and made["y"].to_pylist() == [2.5, None]
    pq.write_table(made.drop_columns("history"), tmp_path / "log.parquet")
    again = read(tmp_path, events=tmp_path / "log.parquet", context=["x"], null="b")
    assert again["x"].to_pylist() == [None, None]
    path = write_json(tmp_path / "log.jsonl", [{"user_id": 1, "item_id": "a", "timestamp": 1, "x": "none"}])
    assert read(tmp_path, events=path, context=["x"], null="none")["x"].to_pylist() == [None]


def test_decimal_commas_are_numbers_by_request(tmp_path):
    log = write(tmp_path / "log.csv", "1;5;1;2,75;3,5", "2;6;2;3;-0,5", header="user_id;item_id;timestamp;w;x")
    types = {"x": "number"}
    made = read(tmp_path, events=log, weight="w", context=["x"], decimal=",", types=types)
    assert made["weight"].to_pylist() == [2.75, 3.0] and made["x"].to_pylist() == [3.5, -0.5]
    assert "decimal=comma" in refusal(DataError, tmp_path, events=log, weight="w")
    log = write(tmp_path / "log.csv", '1,5,1,"1,234.5"', header=f"{HEADER},w")
    assert "'w' is 1,234.5" in refusal(DataError, tmp_path, events=log, weight="w", decimal=",")


def test_text_with_separators_becomes_lists(tmp_path):
    items = write(tmp_path / "items.csv", "5,a|b,1|22", "6,,", "7,b,3", header="item_id,genres,similar")
    log = write(tmp_path / "log.csv", "1,5,1")
    made = read(tmp_path, "items", events=log, items=items, lists={"genres": "|", "similar": "pipe"})
    assert made["genres"].to_pylist() == [["a", "b"], None, ["b"]]
    assert made["similar"].to_pylist() == [[1, 22], None, [3]]
    items = write(tmp_path / "items.csv", "5,a,1|022", header="item_id,genres,similar")
    made = read(tmp_path, "items", events=log, items=items, lists={"similar": "|"})
    assert made["similar"].to_pylist() == [["1", "022"]]
    assert "lists names a column 'genre'" in refusal(ConfigError, tmp_path, events=log, lists={"genre": "|"})


# ---------------------------------------------------------------- types of Parquet


def test_types_of_parquet_that_models_do_not_read_become_such_that_they_do(tmp_path):
    dec = decimal.Decimal("1.50")
    columns = {
        "number": pa.array([dec], pa.decimal128(10, 2)),
        "numbers": pa.array([[dec]], pa.list_(pa.decimal128(10, 2))),
        "nested": pa.array([{"price": dec, "DECIMAL": "x"}]),
        "nothing": pa.nulls(1),
        "no list": pa.array([[]], pa.list_(pa.null())),
        "view": pa.array(["a"], pa.string_view()),
        "instant": pa.array([1_700_000_000 * 10**9 + 5], pa.timestamp("ns", "Europe/Oslo")),
    }
    pq.write_table(pa.table({"user_id": [1], "item_id": [5], "timestamp": [1], **columns}), tmp_path / "log.parquet")
    made = read(tmp_path, events=tmp_path / "log.parquet", context=list(columns))
    found = {name: made[name].to_pylist()[0] for name in columns if name != "instant"}
    assert found == {
        "number": 1.5,
        "numbers": [1.5],
        "nested": {"price": 1.5, "DECIMAL": "x"},
        "nothing": None,
        "no list": [],
        "view": "a",
    }
    assert made.schema.field("nothing").type == pa.string()
    assert made["instant"].cast(pa.int64()).to_pylist() == [1_700_000_000 * 10**9 + 5]


@pytest.mark.parametrize("kind", [pa.binary(), pa.bool_(), pa.list_(pa.int64())], ids=str)
def test_columns_that_cannot_be_ids_are_named(tmp_path, kind):
    value = {pa.binary(): b"\x05", pa.bool_(): True}.get(kind, [5])
    table = pa.table({"user_id": [1], "item_id": pa.array([value], kind), "timestamp": [1]})
    pq.write_table(table, tmp_path / "log.parquet")
    message = refusal(DataError, tmp_path, events=tmp_path / "log.parquet")
    assert "column 'item_id' is" in message and "ids are whole numbers or text" in message


# ---------------------------------------------------------------- rows


def test_where_is_a_condition_over_the_columns_as_they_are_typed(tmp_path):
    header = f"{HEADER},click,price"
    log = write(tmp_path / "log.csv", "1,5,1,1,2.4", "2,6,2,0,9.5", ",7,3,1,2.6", header=header)
    made = read(tmp_path, events=log, where="click = 1 AND user_id IS NOT NULL")
    assert made["item_id"].to_pylist() == [5]
    made = read(tmp_path, events=log, where="price > 2 AND price < 2.5")  # as text or integers 2.4 would not be
    assert made["item_id"].to_pylist() == [5]
    assert "no row meets the condition" in refusal(DataError, tmp_path, events=log, where="click = 2")
    for where, why in (("clik = 1", '"clik" not found'), ("click = (", "syntax error"), ("price", "not a condition")):
        message = refusal(ConfigError, tmp_path, events=log, where=where)
        assert why in message and "The columns are user_id (BIGINT), item_id (BIGINT)" in message


def test_events_with_a_low_rating_are_left_out(tmp_path):
    log = write(tmp_path / "log.csv", "1,5,1,4.0", "1,6,2,3.5", "2,7,3,5.0", header=f"{HEADER},stars")
    made = read(tmp_path, events=log, rating="stars", min_rating=4)
    assert made["item_id"].to_pylist() == [5, 7] and "stars" not in made.column_names
    assert read(tmp_path, events=log, rating="stars", min_rating=4, weight="stars")["weight"].to_pylist() == [4.0, 5.0]
    assert "none of 3 ratings reaches it" in refusal(ConfigError, tmp_path, events=log, rating="stars", min_rating=9)
    assert "go together" in refusal(ConfigError, tmp_path, events=log, min_rating=9)


def test_nulls_of_all_columns_are_reported_at_once(tmp_path):
    log = write(tmp_path / "log.csv", "1,5,1,1", ",6,2,1", "3,,3,1", "3,7,,1", "4,8,4,", header=f"{HEADER},w")
    message = refusal(DataError, tmp_path, events=log, weight="w")
    for line, column in ((3, "user_id"), (4, "item_id"), (5, "timestamp"), (6, "w")):
        assert f"log.csv, line {line}: {column!r} is null" in message
    assert "where='user_id IS NOT NULL'" in message
    text = write(tmp_path / "text.csv", "1,a,1", '2,"",2')
    assert "line 3: 'item_id' is null" in refusal(DataError, tmp_path, events=text)
    pq.write_table(pa.table({"user_id": [1, 2], "item_id": ["a", ""], "timestamp": [1, 2]}), tmp_path / "log.parquet")
    message = refusal(DataError, tmp_path, events=tmp_path / "log.parquet")
    assert "'item_id' is ''" in message and "where=\"item_id <> ''\"" in message
