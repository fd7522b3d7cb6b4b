"""`prepare events` opens files of any layout, and names the file and line that it cannot read."""

from __future__ import annotations

import codecs
import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.sources.test_reading_values import HEADER, read, refusal, write, write_json
from trec_twotower.data.sources import parse_options, prepare
from trec_twotower.errors import ConfigError, DataError


def rows(folder: Path, part: str = "train", **options: Any) -> list[dict[str, Any]]:
    """Rows of a part of the dataset, without histories."""
    return read(folder, part, **options).drop_columns(["history"] if part == "train" else []).to_pylist()


# ---------------------------------------------------------------- Layouts of public logs, with rows made up here


def test_baskets(tmp_path):
    """Online Retail and the like: text among ids, many rows at one time."""
    log = write(tmp_path / "log.csv", "1,85123A,12/13/2010 8:26", "1,POST,12/13/2010 8:26", header="customer,sku,when")
    made = rows(tmp_path, events=log, user="customer", item="sku", timestamp="when")
    assert [(row["item_id"], row["timestamp"]) for row in made] == [("85123A", 1292228760), ("POST", 1292228760)]


def test_sessions_with_dates(tmp_path):
    log = write(tmp_path / "log.csv", "1;;7;1000;2016-05-09", "2;NA;9;1001;2016-05-10", header="s;u;i;frame;eventdate")
    made = rows(tmp_path, events=log, user="s", item="i", timestamp="eventdate")
    assert [row["timestamp"] for row in made] == [1462752000, 1462838400]


def test_ids_that_pandas_wrote_as_floats(tmp_path):
    log = write(tmp_path / "log.csv", "A,1,17850.0", "B,2,", "C,3,17851.0", header="item_id,timestamp,user_id")
    assert "line 3: 'user_id' is null" in refusal(DataError, tmp_path, events=log)
    made = rows(tmp_path, events=log, where="user_id IS NOT NULL")
    assert [(row["user_id"], row["item_id"]) for row in made] == [(17850, "A"), (17851, "C")]


def test_latin_1_with_semicolons_and_a_null_word(tmp_path):
    log = write(tmp_path / "log.csv", "1;5;1", "2;6;2", header="user_id;item_id;timestamp")
    users = tmp_path / "users.csv"
    users.write_bytes("user_id;city;age\n1;mérida;NULL\n2;köln;31\n".encode("latin-1"))
    message = refusal(DataError, tmp_path, events=log, users=users)
    assert "users.csv, line 2: b'1;m\\xe9rida;NULL' is not utf-8" in message and "encoding=latin-1" in message
    made = rows(tmp_path, "users", events=log, users=users, encoding={"users": "latin-1"}, null=[None])
    assert made == [{"user_id": 1, "city": "mérida", "age": None}, {"user_id": 2, "city": "köln", "age": 31}]


def test_genres_between_bars(tmp_path):
    log = write(tmp_path / "log.csv", "1,5,1", "1,6,2")
    items = write(tmp_path / "items.csv", '5,"Heat, The",Action|Crime', "6,Up,", header="item_id,title,genres")
    made = rows(tmp_path, "items", events=log, items=items, lists={"genres": "|"})
    assert made == [
        {"item_id": 5, "title": "Heat, The", "genres": ["Action", "Crime"]},
        {"item_id": 6, "title": "Up", "genres": None},
    ]


@pytest.mark.parametrize("name", ["u.data", "log.tsv", "log.csv"])
def test_tabs_without_header_and_two_kinds_of_line_ends(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"196\t242\t3\t100\n22\t377\t1\t200\n23\t302\t5\t300\r\n24\t303\t4\t400\n")
    options = {"columns": ["u", "i", "stars", "t"], "user": "u", "item": "i", "timestamp": "t", "context": ["stars"]}
    options |= {"format": "csv"} if name == "u.data" else {}
    made = rows(tmp_path, events=path, **options)
    assert [tuple(row.values()) for row in made] == [
        (22, 377, 200, 1),
        (23, 302, 300, 5),
        (24, 303, 400, 4),
        (196, 242, 100, 3),
    ]


def test_json_lines_of_reviews(tmp_path):
    objects = [
        {
            "overall": 5.0,
            "reviewerID": "A1",
            "asin": "0000530HU",
            "unixReviewTime": 1472688000,
            "style": {"Size:": "L"},
        },
        {"overall": 2.0, "reviewerID": "A2", "asin": "B01", "unixReviewTime": 1472774400, "vote": "2"},
    ]
    options = {
        "user": "reviewerID",
        "item": "asin",
        "timestamp": "unixReviewTime",
        "rating": "overall",
        "min_rating": 4,
    }
    made = rows(tmp_path, events=write_json(tmp_path / "log.json", objects), **options)
    assert made == [{"user_id": "A1", "item_id": "0000530HU", "timestamp": 1472688000}]


def test_python_dicts_are_refused_with_the_command_that_converts_them(tmp_path):
    log = tmp_path / "log.json"
    log.write_text("{'user_id': 1, 'item_id': u'a', 'timestamp': 1, 'also': None}\n")
    message = refusal(DataError, tmp_path, events=log)
    assert "log.json, line 1:" in message and "it is a Python dict" in message and "ast.literal_eval" in message


def test_a_key_that_a_json_object_has_twice_is_named_with_its_line(tmp_path):
    log = tmp_path / "log.jsonl"
    line = '{"user_id": 1, "item_id": 2, "timestamp": 3}'
    log.write_text(f'{line}\n{{"user_id": 1, "item_id": 2, "item_id": 9, "timestamp": 3}}\n{line}\n')
    message = refusal(DataError, tmp_path, events=log)
    assert message.endswith("log.jsonl, line 2: key 'item_id' is there twice: give each key once.")


def test_a_pattern_may_begin_with_a_star_and_an_empty_one_names_the_files_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv"):
        write(tmp_path / name, f"{name},5,1")
    assert [row["user_id"] for row in rows(tmp_path, **parse_options("events", ["events=*.csv"]))] == ["a.csv", "b.csv"]
    message = refusal(DataError, tmp_path, **parse_options("events", ["events=*.zzzzzzzz"]))
    assert "*.zzzzzzzz: there is no such file (known:" in message and "a.csv" in message and ".tmp" not in message


def test_columns_between_double_colons(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::0111161::8::100\n2::1234567::9::200\n")
    (tmp_path / "users.dat").write_text("1::11111111\n2::22222222\n")
    options = {"events": tmp_path / "ratings.dat", "users": tmp_path / "users.dat", "format": "csv"}
    message = refusal(DataError, tmp_path, **{**options, "format": None})
    assert "ratings.dat has none of the endings" in message and "format.events=csv" in message
    options["columns"] = {"events": ["user_id", "item_id", "stars", "timestamp"], "users": ["user_id", "twitter"]}
    assert [row["item_id"] for row in rows(tmp_path, **options)] == ["0111161", "1234567"]
    assert rows(tmp_path, "users", **options)[1] == {"user_id": 2, "twitter": 22222222}


def test_recbole(tmp_path):
    log = tmp_path / "ml.inter"
    log.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t05\t4\t8.8E8\n2\t6\t3\t9e8\n")
    items = tmp_path / "ml.item"
    items.write_text('item_id:token\tgenre:token_seq\n05\tDrama "noir"\n6\tWar Drama\n')
    options = {"user": "user_id:token", "item": "item_id:token", "timestamp": "timestamp:float", "format": "csv"}
    options |= {"items": items, "lists": {"genre:token_seq": "space"}}
    made = rows(tmp_path, events=log, **options)
    assert [tuple(row.values()) for row in made] == [(1, "05", 880_000_000), (2, "6", 900_000_000)]
    assert rows(tmp_path, "items", events=log, **options)[1]["genre:token_seq"] == ["War", "Drama"]


def test_impressions_with_clicks_and_milliseconds(tmp_path):
    log = write(tmp_path / "log.csv", "1,5,1600000000123,0", "1,6,1600000001000,1", header=f"{HEADER},click")
    made = rows(tmp_path, events=log, where="click = 1")
    assert made == [{"user_id": 1, "item_id": 6, "timestamp": 1600000001}]


def test_json_objects_over_several_lines(tmp_path):
    objects = [{"user_id": 1, "item_id": "a", "timestamp": 1}, {"user_id": 2, "item_id": None, "timestamp": 2}]
    for text in (json.dumps(objects, indent=1), "\n".join(json.dumps(each, indent=2) for each in objects)):
        (tmp_path / "log.json").write_text(text)
        assert "log.json, row 1 (counted from 0): 'item_id' is null" in refusal(
            DataError, tmp_path, events=tmp_path / "log.json"
        )
        made = rows(tmp_path, events=tmp_path / "log.json", where="item_id IS NOT NULL")
        assert made == [{"user_id": 1, "item_id": "a", "timestamp": 1}]


# ---------------------------------------------------------------- Folders


def test_a_file_of_many_is_named_with_its_line(tmp_path):
    for name in "abc":
        write(tmp_path / "parts" / f"{name}.csv", "1,5,1", "2,6,2")
    for content, parts in (
        (b"1,5,1\n2,caf\xe9,2\n", ["b.csv, line 3", "caf\\xe9", "is not utf-8"]),
        (b"1,5,1\n\n2,6,2,9\n", ["b.csv, line 4", "4 columns where the first line has 3"]),
        (b"1,5,1\n2,6\n", ["b.csv, line 3", "2 columns where the first line has 3"]),
        (b'1,"5\n2,6,2\n', ["b.csv, line 2", "a quoted value does not end", "quote=none"]),
        (b'1,"5\nx",1\n2,,2\n', ["b.csv, line 4", "'item_id' is null"]),
    ):
        (tmp_path / "parts" / "b.csv").write_bytes(f"{HEADER}\n".encode() + content)
        message = refusal(DataError, tmp_path, events=tmp_path / "parts")
        assert all(part in message for part in parts), message


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_zipped_files_that_are_cut_are_named(tmp_path, ending):
    lines = [{"user_id": user % 9, "item_id": user % 7, "timestamp": user} for user in range(30_000)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if ending == "csv":
        text = "\n".join([HEADER, *(",".join(map(str, line.values())) for line in lines)]) + "\n"
    zipped = gzip.compress(text.encode())
    (tmp_path / "parts").mkdir()
    for name in "ab":
        (tmp_path / "parts" / f"{name}.{ending}.gz").write_bytes(zipped)
    for length in (len(zipped) // 2, len(zipped) - 4, 14):
        (tmp_path / "parts" / f"b.{ending}.gz").write_bytes(zipped[:length])
        message = refusal(DataError, tmp_path, events=tmp_path / "parts")
        assert f"b.{ending}.gz cannot be unzipped to its end" in message, message


def test_columns_of_files_are_matched_by_name(tmp_path, capsys):
    write(tmp_path / "parts" / "a.csv", "1,5,1,tv", header=f"{HEADER},device")
    write(tmp_path / "parts" / "b.csv", "2,6,2", header="timestamp,item_id,user_id")
    made = rows(tmp_path, events=tmp_path / "parts", context=["device"])
    assert [(row["user_id"], row["device"]) for row in made] == [(1, "tv"), (2, None)]
    assert "column 'device' is not in 1 of 2 files: null in their rows" in capsys.readouterr().err
    write(tmp_path / "parts" / "b.csv", "2,6", header="timestamp,item_id")
    message = refusal(DataError, tmp_path, events=tmp_path / "parts")
    assert "b.csv: there is no column 'user_id', which other files" in message


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_names_that_differ_in_case_alone_are_refused(tmp_path, ending):
    items = tmp_path / f"items.{ending}"
    if ending == "csv":
        write(items, "5,a,b", header="item_id,brand,Brand")
    elif ending == "jsonl":
        write_json(items, [{"item_id": 5, "brand": "a"}, {"item_id": 6, "Brand": "b"}])
    else:
        pq.write_table(pa.table({"item_id": [5], "brand": ["a"], "Brand": ["b"]}), items)
    message = refusal(DataError, tmp_path, events=write(tmp_path / "log.csv", "1,5,1"), items=items)
    assert "'brand' and 'Brand' differ" in message or "'Brand' and 'brand' differ" in message
    log = write(tmp_path / "log.csv", "1,5,6,1", header="user_id,item_id,item_id,timestamp")
    assert "column 'item_id' is there twice" in refusal(DataError, tmp_path, events=log)


def test_names_of_json_that_only_look_like_renamed_twins_are_read(tmp_path):
    items = write_json(tmp_path / "items.jsonl", [{"item_id": 5, "brand": "a", "brand_1": "b"}])
    made = rows(tmp_path, "items", events=write(tmp_path / "log.csv", "1,5,1"), items=items)
    assert made == [{"item_id": 5, "brand": "a", "brand_1": "b"}]


def test_empty_files_are_reported_as_such_and_pass_among_others(tmp_path):
    for name in ("a.csv", "b.jsonl", "c.tsv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
        assert "empty" in refusal(DataError, tmp_path, events=tmp_path / name)
    assert "have no rows" in refusal(DataError, tmp_path, events=write(tmp_path / "none.csv"))
    write(tmp_path / "csv" / "a.csv", "1,5,1")
    (tmp_path / "csv" / "b.csv").touch()
    write(tmp_path / "csv" / "c.csv")
    (tmp_path / "json").mkdir()
    write_json(tmp_path / "json" / "a.jsonl", [{"user_id": 1, "item_id": 5, "timestamp": 1}])
    (tmp_path / "json" / "b.jsonl").touch()
    for name in ("csv", "json"):
        assert [row["item_id"] for row in rows(tmp_path, events=tmp_path / name)] == [5]


def test_keys_of_hive_folders_are_columns_of_text_like_those_of_csv(tmp_path):
    def part(name: str, first: int) -> None:
        path = tmp_path / "log" / name / "part.parquet"
        path.parent.mkdir(parents=True)
        table = {"user_id": [first, first + 1], "item_id": [5, 6], "timestamp": [first, first + 1]}
        pq.write_table(pa.table(table), path)

    part("day=2024-01-31/store=007", 0)
    part("day=2024-02-01/store=New%20York", 10)
    part("day=2024-02-01/store=__HIVE_DEFAULT_PARTITION__", 20)
    for place in ("log", "log/*/*/*.parquet"):
        made = rows(tmp_path, events=tmp_path / place, context=["store"], timestamp="day")
        assert [row["store"] for row in made] == ["007", "007", "New York", "New York", None, None]
        assert {row["timestamp"] for row in made} == {1706659200, 1706745600}
    inside = tmp_path / "log" / "day=2024-01-31" / "store=007" / "part.parquet"
    assert "no column 'store'" in refusal(DataError, tmp_path, events=inside, context=["store"])


@pytest.mark.parametrize("key", ["user_id", "USER_ID"])
def test_a_key_of_hive_folders_that_is_a_column_of_the_files_is_refused(tmp_path, key):
    log = write(tmp_path / "log" / f"{key}=9" / "part.csv", "1,5,1", "2,6,2")
    message = refusal(DataError, tmp_path, events=tmp_path / "log")
    assert f"the folder '{key}=9' gives a value to {key!r}, and the files have a column 'user_id'" in message
    assert [row["user_id"] for row in rows(tmp_path, events=log)] == [1, 2]  # given alone, its folders do not count


def test_folders_of_table_formats_are_refused_at_any_depth(tmp_path):
    write(tmp_path / "lake" / "log" / "day=1" / "part.csv", "1,5,1")
    (tmp_path / "lake" / "log" / "_delta_log").mkdir()
    for place in ("lake", "lake/log", "lake/log/day=1", "lake/log/*/*.csv"):
        assert "lake/log is a table of Delta Lake" in refusal(DataError, tmp_path, events=tmp_path / place)


# ---------------------------------------------------------------- Text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "utf-16", "utf-16-le", "shift_jis"])
@pytest.mark.parametrize("ending", ["csv", "json", "csv.gz"])
def test_text_of_any_encoding_is_the_same(tmp_path, encoding, ending):
    name = {"cp1252": "“é€”", "shift_jis": "日本語"}.get(encoding, "é")
    text = f'{HEADER}\n1,5,1\n2,"{name}",2\n' if ending != "json" else ""
    text = text or "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in json_rows(name))
    content = text.encode(encoding)
    path = tmp_path / f"log.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    made = rows(tmp_path, events=path, encoding=encoding)
    assert [row["item_id"] for row in made] == ["5", name]


def json_rows(name: str) -> list[dict[str, Any]]:
    return [{"user_id": 1, "item_id": "5", "timestamp": 1}, {"user_id": 2, "item_id": name, "timestamp": 2}]


def test_an_error_in_copied_text_names_the_original(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(f"{HEADER}\n1,é,1\n2,,2\n".encode("cp1252"))
    message = refusal(DataError, tmp_path, events=path, encoding="cp1252")
    assert message.startswith(f"{path}, line 3: 'item_id' is null")
    path.write_bytes(f"{HEADER}\n1,é,1\n2,x,2,3\n".encode("cp1252"))
    assert refusal(DataError, tmp_path, events=path, encoding="cp1252").startswith(
        f"{path}, line 3: '2,x,2,3': 4 columns"
    )
    path.write_bytes(b'{"user_id": 1, "item_id": "\xe9"}\n{"user_id": \n')
    message = refusal(DataError, tmp_path, events=path, encoding="cp1252", format="json")
    assert message.startswith(f"{path}, line 2: ") and "as-utf-8" not in message


def test_byte_order_marks_are_no_part_of_names(tmp_path):
    for content in (f"{HEADER}\n1,5,1\n", '"user_id","item_id","timestamp"\n1,5,1\n'):
        (tmp_path / "log.csv").write_bytes(codecs.BOM_UTF8 + content.encode())
        assert rows(tmp_path, events=tmp_path / "log.csv") == [{"user_id": 1, "item_id": 5, "timestamp": 1}]
    (tmp_path / "log.csv").write_bytes(content.encode("utf-16"))
    assert "is not UTF-8 but UTF-16: set encoding=utf-16" in refusal(DataError, tmp_path, events=tmp_path / "log.csv")
    (tmp_path / "log.csv").write_bytes("user_id,item_id,timestamp\n1,“5”,1\n".encode("cp1252"))
    message = refusal(DataError, tmp_path, events=tmp_path / "log.csv", encoding="latin-1")
    assert "is not latin-1" in message and "cp1252" in message
    assert "there is no such encoding" in refusal(ConfigError, tmp_path, events="x", encoding="utf-9")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_one_kind_and_quoted_ones(tmp_path, end):
    text = end.join([HEADER + ",note", "1,5,1,plain", f'2,6,2,"two{end}lines"', ""])
    (tmp_path / "log.csv").write_bytes(text.encode())
    made = rows(tmp_path, events=tmp_path / "log.csv", context=["note"])
    assert [row["note"] for row in made] == ["plain", f"two{end}lines"]


def test_mixed_line_ends_in_some_of_many_files(tmp_path):
    write(tmp_path / "parts" / "a.csv", "1,5,1")
    (tmp_path / "parts" / "b.csv").write_bytes(f"{HEADER}\r\n2,6,2\n3,,3\r\n".encode())
    message = refusal(DataError, tmp_path, events=tmp_path / "parts")
    assert "b.csv, line 3: 'item_id' is null" in message
    made = rows(tmp_path, events=tmp_path / "parts", where="item_id IS NOT NULL")
    assert [row["item_id"] for row in made] == [5, 6]


def test_quotes_in_tabs_do_not_swallow_lines(tmp_path):
    log = tmp_path / "log.tsv"
    log.write_text('user_id\titem_id\ttimestamp\ttitle\n1\t5\t1\t"Heat\n2\t6\t2\tUp\n3\t7\t3\tthe end\n4\t8\t4\tend"\n')
    message = refusal(DataError, tmp_path, events=log)
    assert "1 quoted values of 'title' hold line breaks" in message and "quote=none" in message
    made = rows(tmp_path, events=log, context=["title"], quote="none")
    assert [row["title"] for row in made] == ['"Heat', "Up", "the end", 'end"']


def test_columns_name_what_has_no_header(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("1,5,3\n2,6,4\n")
    message = refusal(DataError, tmp_path, events=log)
    assert "read as the names 1, 5" in message and "columns=[...]" in message
    names = {"user": "u", "item": "i", "timestamp": "t"}
    assert len(rows(tmp_path, events=log, columns=["u", "i", "t"], **names)) == 2
    assert len(rows(tmp_path, events=log, columns=["u", "i", "t"], header=True, **names)) == 1
    assert "names 2 columns" in refusal(DataError, tmp_path, events=log, columns=["u", "i"], **names)
    assert "given twice" in refusal(ConfigError, tmp_path, events=log, columns=["u", "U"], **names)
    log = write(tmp_path / "log.csv", "1,5,1", header="u,i,t")
    message = refusal(DataError, tmp_path, events=log, columns=["u", "i", "t"], **names)
    assert "header=true" in message


def test_options_may_differ_by_table(tmp_path):
    (tmp_path / "log.txt").write_text("1|5|1\n2|6|2\n")
    items = write(tmp_path / "items.csv", "5;a|b", "6;c", header="item_id;tags")
    made = rows(
        tmp_path,
        "items",
        events=tmp_path / "log.txt",
        items=items,
        format={"events": "csv"},
        columns={"events": ["user_id", "item_id", "timestamp"]},
        separator={"items": "semicolon"},
        header={"items": True},
        lists={"tags": "|"},
    )
    assert made == [{"item_id": 5, "tags": ["a", "b"]}, {"item_id": 6, "tags": ["c"]}]
    assert "'events', 'items' or 'users'" in refusal(ConfigError, tmp_path, events="x", separator={"logs": ";"})


def test_the_command_line_passes_text_as_it_is(tmp_path, cli):
    (tmp_path / "log.dat").write_text('1|31/12/2024 10:00|5|say "hi"|1,5\n2|01/01/2025 10:00|6||2,5\n')
    said = cli(
        *(
            "prepare",
            "events",
            "--out",
            tmp_path / "out",
            f"events={tmp_path / 'log.dat'}",
            "format=csv",
            "separator=|",
        ),
        *("columns=[user_id, timestamp, item_id, text, w]", "time_format=%d/%m/%Y %H:%M", "decimal=,", "weight=w"),
        *("where='say \"hi\"' = text OR text IS NULL", "context=[text]", "quote.events=none", "types.text=text"),
    )
    assert said.code == 0, said.err
    made = pq.read_table(tmp_path / "out" / "train").to_pylist()
    assert [(row["timestamp"], row["weight"], row["text"]) for row in made] == [
        (1735639200, 1.5, 'say "hi"'),
        (1735725600, 2.5, None),
    ]


# ---------------------------------------------------------------- The commands of the documentation

BASKETS = "InvoiceNo,StockCode,Quantity,InvoiceDate,CustomerID,Country\n" + "".join(
    f"{day},{item},{1 if item != 'C' else -1},12/{day + 12}/2010 8:26,{user},Österreich\n"
    for user in (17850, 17851, "")
    for day, items in enumerate((("85123A", "POST"), ("22423", "C"), ("47566", "21")), 1)
    for item in items
)
SAMPLES: dict[str, dict[str, bytes]] = {
    "Online Retail (CSV from the spreadsheet)": {"online_retail.csv": BASKETS.encode("cp1252")},
    "Diginetica": {
        "train-item-views.csv": b"sessionId;userId;itemId;timeframe;eventdate\n"
        + b"".join(b"1;NA;%d;%d;2016-05-09\n" % (item, 1000 * item) for item in range(1, 5))
    },
    "Yoochoose": {
        "yoochoose-clicks.dat": b"".join(b"7,2014-04-0%dT10:51:09.277Z,%d,0\n" % (n, 214 + n) for n in range(1, 5))
    },
    "MovieTweetings": {"ratings.dat": b"".join(b"1::00%d::%d::%d\n" % (n, 6 + n, 1365 + n) for n in range(5))},
    "Last.fm (HetRec 2011)": {
        "user_artists.dat": b"userID\tartistID\tweight\r\n" + b"".join(b"2\t%d\t%d\r\n" % (n, 9 - n) for n in range(9))
    },
    "Book-Crossing": {
        "BX-Book-Ratings.csv": b'"User-ID";"ISBN";"Book-Rating"\n'
        + b"".join(b'"27";"03454510%dX";"%d"\n' % (n, n) for n in range(9))
        + '"28";"é";"9"\n'.encode("latin-1")
    },
    "RecBole": {
        "ml.inter": b"user_id:token\titem_id:token\ttimestamp:float\n"
        + b"".join(b"1\t0%d\t%d\n" % (n, 880 + n) for n in range(4)),
        "ml.item": b"item_id:token\tgenre:token_seq\n" + b"".join(b"0%d\tWar Drama\n" % n for n in range(4)),
    },
    "impressions with clicks": {
        "impressions.csv": b"user_id,item_id,timestamp,click\n"
        + b"".join(b"1,%d,%d,%d\n" % (n, 1600000000000 + n, n % 2) for n in range(9))
    },
    "folders `log/day=2024-05-31/` of files without a column of times": {
        f"log/day=2024-05-0{n}/part-0.csv": b"user_id,item_id\n1,%d\n" % n for n in range(1, 5)
    },
}


def documented() -> dict[str, list[str]]:
    """The arguments of each log of the table of public logs."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    table = page[page.index("#### Public logs") : page.index("### Splits")]
    rows = [line.strip("| \n").split(" | ", 1) for line in table.splitlines() if line.startswith("| ")]
    return {name: shlex.split(command.strip("`")) for name, command in rows if command.startswith("`events=")}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_documented_command_of_a_public_log_reads_it(tmp_path, monkeypatch, name):
    for path, content in SAMPLES[name].items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    manifest = prepare("events", Path("out"), parse_options("events", documented()[name]))
    assert manifest["counts"]["train_rows"] and manifest["counts"]["test_rows"]
    items = pq.read_table("out/items")["item_id"]
    expected = {
        "MovieTweetings": ["001", "002", "003", "004"],
        "Book-Crossing": [f"03454510{n}X" for n in range(5, 9)] + ["é"],
        "RecBole": ["00", "01", "02", "03"],
        "impressions with clicks": [1, 3, 5, 7],
        "folders `log/day=2024-05-31/` of files without a column of times": [1, 2, 3, 4],
    }
    assert items.to_pylist() == expected.get(name, items.to_pylist())


def test_every_log_with_a_command_has_a_sample():
    assert set(documented()) == set(SAMPLES)
