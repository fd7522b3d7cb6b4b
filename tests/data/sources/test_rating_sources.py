"""Public files of ratings become datasets: what their lines say, by hand; dirty lines; and a model of each."""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from trec_twotower.data.sources import prepare
from trec_twotower.errors import ConfigError, DataError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DAY_MS = 86_400_000
START_MS = 1_600_000_000_000  # 2020-09-13


def rows(dataset: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(dataset / split).to_pylist() if (dataset / split).is_dir() else []


def refusal(kind: type[Exception], source: str, folder: Path, **options: object) -> str:
    out = folder.parent / "refused"
    with pytest.raises(kind) as error:
        prepare(source, out, {"data_dir": str(folder), **options})
    assert not out.exists()
    return str(error.value)


# ---------------------------------------------------------------- Amazon Reviews 2023


def review(user: str, item: str, day: float, rating: Any = 5.0, **more: Any) -> dict[str, Any]:
    """A line as the documentation shows one."""
    return {
        "rating": rating,
        "title": "Great read",
        "text": 'Line one.<br />"Two", said she — \n três 本',
        "images": [],
        "asin": item + "V",
        "parent_asin": item,
        "user_id": user,
        "timestamp": START_MS + int(day * DAY_MS) + 123,
        "helpful_vote": 3,
        "verified_purchase": True,
        **more,
    }


def about(item: str, **more: Any) -> dict[str, Any]:
    return {
        "main_category": "Books",
        "title": f"Book {item}",
        "subtitle": "Hardcover – October 1, 2004",
        "author": {
            "avatar": "https://m.media-amazon.com/x.jpg",
            "name": f"Writer of {item}",
            "about": ["Born.", "Wrote."],
        },
        "average_rating": 4.5,
        "rating_number": 21,
        "features": ["Fast."],
        "description": ["Slow", "burn"],
        "price": 19.99,
        "images": [{"large": "x", "variant": "MAIN"}],
        "videos": [],
        "store": f"Writer of {item} (Author)",
        "categories": ["Books", "Literature & Fiction"],
        "details": {"Publisher": "Scholastic Press; Reprint edition (October 1, 2004)", "Language": "English"},
        "parent_asin": item,
        "bought_together": None,
        **more,
    }


def write_amazon(folder: Path, reviews: list[Any], metadata: list[Any] | None, *, gz: bool = False) -> Path:
    """Books.jsonl and meta_Books.jsonl; a text stands as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("Books", reviews), ("meta_Books", metadata)):
        if lines is None:
            continue
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path = folder / f"{name}.jsonl"
        if gz:
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    return folder


# Days of the reviews; valid begins on day 10, test on day 20.
REVIEWS = [
    review("U1", "A", 1),
    review("U1", "B", 2),
    review("U1", "B", 3),  # again: dropped
    review("U1", "C", 4, 2.0),  # not liked: nowhere
    review("U1", "D", 11),
    review("U1", "E", 21),
    review("U1", "F", 22, 4.0),
    review("U2", "D", 1.0, verified_purchase=False),
    review("U2", "A", 12),
    review("U2", "B", 25),
]
SPLIT = {"valid_from": START_MS // 1000 + 10 * 86_400, "test_from": START_MS // 1000 + 20 * 86_400}
ALL = {**SPLIT, "min_user_events": 1, "min_item_events": 1}


@pytest.mark.parametrize("gz", [False, True])
def test_amazon_reviews_by_hand(tmp_path, gz):
    folder = write_amazon(tmp_path / "raw", REVIEWS, [about(item) for item in "ABCDEFZ"], gz=gz)
    made = prepare("amazon-reviews", tmp_path / "out", {"data_dir": str(folder), **ALL})
    second = START_MS // 1000
    assert rows(tmp_path / "out", "train") == [
        {"user_id": "U1", "item_id": "A", "timestamp": second + 86_400, "history": []},
        {"user_id": "U1", "item_id": "B", "timestamp": second + 2 * 86_400, "history": ["A"]},
        {"user_id": "U2", "item_id": "D", "timestamp": second + 86_400, "history": []},
    ]
    assert rows(tmp_path / "out", "valid") == [
        {"user_id": "U1", "positives": ["D"], "timestamp": SPLIT["valid_from"], "history": ["A", "B"]},
        {"user_id": "U2", "positives": ["A"], "timestamp": SPLIT["valid_from"], "history": ["D"]},
    ]
    assert rows(tmp_path / "out", "test") == [
        {"user_id": "U1", "positives": ["E", "F"], "timestamp": SPLIT["test_from"], "history": ["A", "B", "D"]},
        {"user_id": "U2", "positives": ["B"], "timestamp": SPLIT["test_from"], "history": ["D", "A"]},
    ]
    items = rows(tmp_path / "out", "items")
    assert [item["item_id"] for item in items] == ["A", "B", "D", "E", "F"]
    assert items[0] == {
        "item_id": "A",
        "title": "Book A",
        "subtitle": "Hardcover – October 1, 2004",
        "main_category": "Books",
        "store": "Writer of A (Author)",
        "author": "Writer of A",
        "publisher": "Scholastic Press",
        "year": 2004,
        "categories": ["Books", "Literature & Fiction"],
        "price": 19.99,
        "average_rating": 4.5,
        "rating_number": 21,
        "description": "Fast. Slow burn",
    }
    counts = made["counts"]
    assert {name: counts[name] for name in ("ratings_read", "not_positive", "repeats_dropped", "interactions")} == {
        "ratings_read": 10,
        "not_positive": 1,
        "repeats_dropped": 1,
        "interactions": 8,
    }


def test_amazon_metadata_takes_what_the_fields_hold(tmp_path):
    """A field may hold a number, text, a list, an object or nothing; an item may have no line, or several."""
    odd = [
        about("A", price=None, author=None, details=None, categories=None, features=[], description=[], title=""),
        about("B", price="from 5.99", author="Jane Doe", categories="Books", details='{"Publisher": "P (1999)"}'),
        about("D", price="None", author='{"name": "In Text"}', average_rating="4.1", details={}),
        about("E", price="$1,005.50", rating_number=3, details={"Date First Available": "May 3, 2011"}),
        about("E", price="7", rating_number=30, details={"Publication date": "2012"}),
        about("E", price="8", rating_number=None),
        about("", title="of nothing"),
        {"parent_asin": "Z"},
    ]
    folder = write_amazon(tmp_path / "raw", REVIEWS, odd)
    options = {"data_dir": str(folder), **ALL, "description_chars": 6}
    made = prepare("amazon-reviews", tmp_path / "out", options)
    items = {item["item_id"]: item for item in rows(tmp_path / "out", "items")}
    assert {name: item["price"] for name, item in items.items()} == {
        "A": None,
        "B": 5.99,
        "D": None,
        "E": 7.0,
        "F": None,
    }
    authors = [items[name]["author"] for name in "ABDEF"]
    assert authors == [None, "Jane Doe", "In Text", "Writer of E", None]
    assert [items[name]["year"] for name in "ABDEF"] == [None, 1999, None, 2012, None]
    assert [items[name]["categories"] for name in "ABF"] == [[], ["Books"], None]
    assert (items["A"]["title"], items["A"]["description"], items["B"]["description"]) == (None, None, "Fast. ")
    assert items["D"]["average_rating"] == 4.1
    counts = made["counts"]
    assert counts["items_without_metadata"] == 1 and counts["metadata_repeats_dropped"] == 2

    everything = prepare("amazon-reviews", tmp_path / "all", {**options, "all_items": True})
    assert everything["counts"]["items"] == 6 and everything["counts"]["metadata_without_id_dropped"] == 1
    assert {item["item_id"] for item in rows(tmp_path / "all", "items")} == set("ABDEFZ")


def test_amazon_leave_last_out_cores_and_verified_reviews(tmp_path):
    folder = write_amazon(tmp_path / "raw", REVIEWS, None)
    options = {"data_dir": str(folder), "metadata": False, "split": "leave-last-out"}
    prepare("amazon-reviews", tmp_path / "out", {**options, "min_user_events": 3, "min_item_events": 2})
    # A, B and D are taken by both users, and each user keeps three.
    assert [(row["user_id"], row["history"], row["positives"]) for row in rows(tmp_path / "out", "test")] == [
        ("U1", ["A", "B"], ["D"]),
        ("U2", ["D", "A"], ["B"]),
    ]
    assert rows(tmp_path / "out", "items") == [{"item_id": item} for item in "ABD"]
    verified = {**options, "verified_only": True, "min_user_events": 1, "min_item_events": 1}
    assert prepare("amazon-reviews", tmp_path / "verified", verified)["counts"]["interactions"] == 7


def test_amazon_reviews_of_one_second_are_in_the_order_of_their_milliseconds(tmp_path):
    log = [review("U1", item, 1 + part / DAY_MS) for item, part in (("D", 0), ("C", 200), ("B", 201), ("A", 876))]
    folder = write_amazon(tmp_path / "raw", log[::-1], None)
    options = {"data_dir": str(folder), "metadata": False, "min_user_events": 1, "min_item_events": 1}
    prepare("amazon-reviews", tmp_path / "out", {**options, "split": "leave-last-out"})
    second = START_MS // 1000 + 86_400
    [test] = rows(tmp_path / "out", "test")
    assert test == {"user_id": "U1", "positives": ["A"], "timestamp": second, "history": ["D", "C", "B"]}


def test_amazon_reads_one_category_of_several_or_all(tmp_path):
    folder = write_amazon(tmp_path / "raw", REVIEWS, [about(item) for item in "ABDEF"])
    comics = write_amazon(tmp_path / "comics", [review("U9", "K", 5)], [about("K")])
    (comics / "Books.jsonl").rename(folder / "Comic_Books.jsonl")
    (comics / "meta_Books.jsonl").rename(folder / "meta_Comic_Books.jsonl")
    for category, items in (("Books", "ABDEF"), (None, "ABDEFK")):
        options = {"data_dir": str(folder), **ALL, "category": category}
        prepare("amazon-reviews", tmp_path / str(category), options)
        assert [item["item_id"] for item in rows(tmp_path / str(category), "items")] == list(items)


def test_a_catalogue_has_no_item_that_the_core_drops(tmp_path):
    """Each item is there twice or once; those of one event are gone, although the files tell of them."""
    amazon = write_amazon(tmp_path / "amazon", REVIEWS, [about(item) for item in "ABCDEFZ"])
    for source, folder, items in (
        ("amazon-reviews", amazon, ["A", "B", "D"]),
        ("movielens", write_csv(tmp_path / "movielens"), [1, 2]),
        ("goodbooks", write_goodbooks(tmp_path / "goodbooks"), [1, 3]),
    ):
        options = {"data_dir": str(folder), "min_user_events": 1, "min_item_events": 2}
        if source == "amazon-reviews":
            options |= {"split": "leave-last-out"}
        prepare(source, tmp_path / f"{source} out", options)
        assert [item["item_id"] for item in rows(tmp_path / f"{source} out", "items")] == items


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"rating": 5.0, "user_id": "U', ["Books.jsonl, line 11: ", "is not one JSON object"]),
        ('["a list"]', ["line 11", "is not one JSON object"]),
        (review("", "A", 1), ["row 10", "'user_id'"]),
        (review("  ", "A", 1), ["row 10", "'user_id'"]),
        ({"rating": 5.0, "user_id": "U", "timestamp": START_MS}, ["row 10", "'parent_asin' is null"]),
        (review("U", "A", 1, "five"), ["row 10", "'rating' is", "five", "a number"]),
        (review("U", "A", 1, timestamp=START_MS // 1000), ["row 10", "'timestamp' is 1600000000", "milliseconds"]),
        (review("U", "A", 1, timestamp=START_MS * 1000), ["row 10", "'timestamp' is 1600000000000000", "milliseconds"]),
        (review("U", "A", 1, timestamp=None), ["row 10", "'timestamp' is null"]),
    ],
)
def test_a_dirty_line_is_named(tmp_path, line, said):
    folder = write_amazon(tmp_path / "raw", [*REVIEWS, line, review("U9", "A", 2)], None)
    message = refusal(DataError, "amazon-reviews", folder, metadata=False, **ALL)
    assert all(each in message for each in said), message


def test_a_dirty_line_of_zipped_metadata_is_named_behind_blank_ones(tmp_path):
    folder = write_amazon(tmp_path / "raw", REVIEWS, [about("A"), "", '{"parent_asin": "B"'], gz=True)
    assert "meta_Books.jsonl.gz, line 3: " in refusal(DataError, "amazon-reviews", folder, **ALL)


@pytest.mark.parametrize(("content", "found"), [(b"{}", "begins with b'{}'"), (b"", "is empty")])
@pytest.mark.parametrize("name", ["Books", "meta_Books"])
def test_a_file_that_is_called_gz_and_is_none_is_named_with_what_to_do(tmp_path, name, content, found):
    folder = write_amazon(tmp_path / "raw", REVIEWS, [about("A")], gz=True)
    (folder / f"{name}.jsonl.gz").write_bytes(content)
    message = refusal(DataError, "amazon-reviews", folder, **ALL)
    assert f"/{name}.jsonl.gz is called .gz, but {found}" in message
    assert "download it again, or take .gz off its name" in message


def test_what_amazon_reviews_needs_is_said(tmp_path):
    folder = write_amazon(tmp_path / "raw", REVIEWS, None)
    assert "put meta_Books.jsonl next to it" in refusal(DataError, "amazon-reviews", folder, **ALL)
    assert "nearest: 'Books'" in refusal(DataError, "amazon-reviews", folder, category="Boks")
    assert "lower it" in refusal(ConfigError, "amazon-reviews", folder, metadata=False, min_rating=6, **ALL)
    late = {**ALL, "valid_from": "2030-01-01", "test_from": "2031-01-01"}
    assert "No event is in the valid period" in refusal(DataError, "amazon-reviews", folder, metadata=False, **late)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no reviews" in refusal(DataError, "amazon-reviews", empty)


def test_no_history_of_many_reviews_holds_what_came_later(tmp_path):
    """Every history, of any split, is what a plain loop over the lines says; core and duplicates included."""
    rng = np.random.default_rng(3)
    log = [
        review(f"U{rng.integers(40)}", f"I{rng.integers(30)}", float(rng.integers(300)) / 10, float(rng.integers(1, 6)))
        for _ in range(1500)
    ]
    folder = write_amazon(tmp_path / "raw", log, None)
    options = {"data_dir": str(folder), "metadata": False, **SPLIT, "min_user_events": 4, "min_item_events": 4}
    prepare("amazon-reviews", tmp_path / "out", {**options, "max_history": 5})

    first: dict[tuple[str, str], int] = {}
    for line in log:
        if line["rating"] >= 4:
            pair = (line["user_id"], line["parent_asin"])
            first[pair] = min(first.get(pair, 1 << 60), line["timestamp"] // 1000)
    while True:
        users, items = defaultdict(int), defaultdict(int)
        for user, item in first:
            users[user] += 1
            items[item] += 1
        rare = [pair for pair in first if users[pair[0]] < 4 or items[pair[1]] < 4]
        if not rare:
            break
        for pair in rare:
            del first[pair]

    def past(user: str, before: int) -> list[str]:
        taken = sorted((second, item) for (who, item), second in first.items() if who == user and second < before)
        return [item for _, item in taken]

    found = {(row["user_id"], row["item_id"]): row["history"] for row in rows(tmp_path / "out", "train")}
    train = {pair: second for pair, second in first.items() if second < SPLIT["valid_from"]}
    assert found == {pair: past(pair[0], second)[-5:] for pair, second in train.items()}
    for split, (start, stop) in {
        "valid": (SPLIT["valid_from"], SPLIT["test_from"]),
        "test": (SPLIT["test_from"], 1 << 60),
    }.items():
        wanted = defaultdict(set)
        for (user, item), second in first.items():
            if start <= second < stop:
                wanted[user].add(item)
        held = rows(tmp_path / "out", split)
        assert {row["user_id"]: set(row["positives"]) for row in held} == wanted
        assert all(row["history"] == past(row["user_id"], start) for row in held)


# ---------------------------------------------------------------- MovieLens

MOVIES = [
    (1, "Toy Story (1995)", "Adventure|Animation|Children"),
    (2, "Misérables, Les (1995)", "Drama|Musical"),
    (3, 'Heat: "The" Film', "(no genres listed)"),
]
RATED = [(7, 1, 5, 100), (7, 2, 4, 200), (7, 3, 3, 300), (8, 3, 4.5, 50), (8, 2, 5, 60), (8, 1, 4, 70)]
# Two users say "pixar", one says "fun" twice.
TAGS = [(7, 1, "Pixar", 10), (8, 1, "pixar ", 20), (8, 1, "fun", 30), (8, 1, "Fun", 31)]
TAGS += [(9, 2, "sad", 1), (9, 3, "late", 65)]


def write_dat(folder: Path, encoding: str = "latin-1") -> Path:
    folder.mkdir()
    for name, lines in {
        "ratings": RATED,
        "movies": MOVIES,
        "users": [(7, "F", 1, 10, "48067"), (8, "M", 56, 16, "70072"), (9, "M", 25, 3, "1")],
    }.items():
        text = "".join("::".join(map(str, line)) + "\n" for line in lines)
        (folder / f"{name}.dat").write_bytes(text.encode(encoding))
    return folder


def write_csv(folder: Path) -> Path:
    folder.mkdir()
    headers = {
        "ratings": "userId,movieId,rating,timestamp",
        "movies": "movieId,title,genres",
        "tags": "userId,movieId,tag,timestamp",
    }
    for name, lines in {"ratings": RATED, "movies": MOVIES, "tags": TAGS}.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            file.write(headers[name] + "\n")
            csv.writer(file, lineterminator="\n").writerows(lines)
    return folder


@pytest.mark.parametrize("layout", ["latin-1", "utf-8", "csv"])
def test_movielens_by_hand(tmp_path, layout):
    folder = write_csv(tmp_path / "raw") if layout == "csv" else write_dat(tmp_path / "raw", layout)
    prepare("movielens", tmp_path / "out", {"data_dir": str(folder)})
    assert rows(tmp_path / "out", "train") == [
        {"user_id": 7, "item_id": 1, "timestamp": 100, "history": []},
        {"user_id": 7, "item_id": 2, "timestamp": 200, "history": [1]},
        {"user_id": 8, "item_id": 3, "timestamp": 50, "history": []},
    ]
    assert rows(tmp_path / "out", "test") == [{"user_id": 8, "positives": [1], "timestamp": 70, "history": [3, 2]}]
    items = rows(tmp_path / "out", "items")
    tags = [{"tags": each} for each in (["pixar", "fun"], ["sad"], ["late"])] if layout == "csv" else [{}] * 3
    assert items == [
        {
            "item_id": 1,
            "title": MOVIES[0][1],
            "year": 1995,
            "genres": ["Adventure", "Animation", "Children"],
            **tags[0],
        },
        {"item_id": 2, "title": MOVIES[1][1], "year": 1995, "genres": ["Drama", "Musical"], **tags[1]},
        {"item_id": 3, "title": MOVIES[2][1], "year": None, "genres": [], **tags[2]},
    ]
    users = rows(tmp_path / "out", "users")
    if layout == "csv":
        assert users == []
        split = {"split": "time", "valid_from": 65, "test_from": 100}  # in the second of the tag "late"
        prepare("movielens", tmp_path / "time", {"data_dir": str(folder), **split})
        assert [item["tags"] for item in rows(tmp_path / "time", "items")] == [["pixar", "fun"], ["sad"], []]
        prepare("movielens", tmp_path / "one", {"data_dir": str(folder), "max_tags": 1})
        assert [item["tags"] for item in rows(tmp_path / "one", "items")] == [["pixar"], ["sad"], ["late"]]
    else:
        assert (
            users[1] == {"user_id": 8, "gender": "M", "age": 56, "occupation": 16, "zip": "70072"} and len(users) == 2
        )


def test_movielens_100k_by_hand(tmp_path):
    """u.data of some mirrors has two kinds of line ends, and u.item is Latin-1."""
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = [b"\t".join(str(value).encode() for value in row) for row in RATED if row[2] != 4.5] + [b"8\t3\t5\t50"]
    (folder / "u.data").write_bytes(b"\n".join(lines[:2]) + b"\n" + b"\r\n".join(lines[2:]) + b"\r\n")
    flags = {1: (3, 4), 2: (8, 12), 3: (0,)}
    with (folder / "u.item").open("w", encoding="latin-1") as file:
        for movie, title, _ in MOVIES:
            own = ["1" if at in flags[movie] else "0" for at in range(19)]
            file.write("|".join([str(movie), title, "01-Jan-1995", "", "http://x/", *own]) + "\n")
    (folder / "u.user").write_text("7|24|M|technician|85711\n8|53|F|other|T8H1N\n9|1|F|none|00501\n")
    prepare("movielens", tmp_path / "out", {"data_dir": str(folder)})
    assert rows(tmp_path / "out", "test") == [{"user_id": 8, "positives": [1], "timestamp": 70, "history": [3, 2]}]
    assert rows(tmp_path / "out", "items") == [
        {"item_id": 1, "title": MOVIES[0][1], "year": 1995, "genres": ["Animation", "Children's"]},
        {"item_id": 2, "title": MOVIES[1][1], "year": 1995, "genres": ["Drama", "Musical"]},
        {"item_id": 3, "title": MOVIES[2][1], "year": None, "genres": []},
    ]
    assert rows(tmp_path / "out", "users") == [
        {"user_id": 7, "gender": "M", "age": 24, "occupation": "technician", "zip": "85711"},
        {"user_id": 8, "gender": "F", "age": 53, "occupation": "other", "zip": "T8H1N"},
    ]


def test_movielens_with_fewer_columns_has_nulls(tmp_path, capsys):
    folder = write_dat(tmp_path / "dat")
    (folder / "movies.dat").write_text("1::One (1999)\n2::Two\n3::Three\n")
    (folder / "users.dat").write_text("7::F\n8::M\n")
    prepare("movielens", tmp_path / "out", {"data_dir": str(folder)})
    assert rows(tmp_path / "out", "items")[0] == {"item_id": 1, "title": "One (1999)", "year": 1999, "genres": []}
    user = {"age": None, "occupation": None, "zip": None}
    assert rows(tmp_path / "out", "users") == [
        {"user_id": 7, "gender": "F", **user},
        {"user_id": 8, "gender": "M", **user},
    ]
    assert "movies.dat has no genres: null in all rows" in capsys.readouterr().err
    (folder / "users.dat").write_text("7::11111111\n8::22222222\n")  # MovieTweetings: accounts
    prepare("movielens", tmp_path / "other", {"data_dir": str(folder)})
    assert not (tmp_path / "other" / "users").exists()
    assert "users.dat is left out" in capsys.readouterr().err
    folder = write_csv(tmp_path / "csv")
    (folder / "movies.csv").write_text("title,movieId\nOne,1\nTwo,2\nThree,3\n")
    prepare("movielens", tmp_path / "named", {"data_dir": str(folder)})
    assert [item["title"] for item in rows(tmp_path / "named", "items")] == ["One", "Two", "Three"]
    (folder / "ratings.csv").write_text("userId,movieId,rating\n7,1,5\n")
    assert "where MovieLens has 'userId,movieId,rating,timestamp'" in refusal(DataError, "movielens", folder)


def test_movielens_ratings_of_one_second_go_by_the_movie_and_all_may_be_trained_on(tmp_path):
    folder = write_dat(tmp_path / "raw")
    lines = [(5, 3, 5, 90), (5, 1, 5, 90), (5, 2, 5, 90), (5, 2, 5, 95), (6, 1, 5, 50)]
    (folder / "ratings.dat").write_text("".join("::".join(map(str, line)) + "\n" for line in lines))
    for options, valid, test in (({}, 2, 3), ({"dedupe": False}, 2, 3), ({"dedupe": False, "hold_out": "any"}, 3, 2)):
        prepare("movielens", tmp_path / "out", {"data_dir": str(folder), **options}, overwrite=True)
        held = [rows(tmp_path / "out", part)[0]["positives"] for part in ("valid", "test")]
        assert held == [[valid], [test]]
    prepare("movielens", tmp_path / "all", {"data_dir": str(folder), "split": "none"})
    assert [row["history"] for row in rows(tmp_path / "all", "serving")] == [[1, 2, 3], [1]]
    assert len(rows(tmp_path / "all", "train")) == 4 and not rows(tmp_path / "all", "test")
    assert "'leave-last-out', 'time' or 'none'" in refusal(ConfigError, "movielens", folder, split="random")


def test_dirty_lines_of_movielens_are_named(tmp_path):
    folder = write_dat(tmp_path / "raw")
    for line, said in (
        ("9::x::5::7", ["ratings.dat, line 7", "'movieId' is x"]),
        ("9::1::good::7", ["line 7", "'rating' is good"]),
        ("9::1::5::-7", ["line 7", "'timestamp' is -7"]),
        ("9::1::5::1600000000000", ["line 7", "'timestamp' is 1600000000000", "seconds"]),
        ("9::1::5", ["ratings.dat, line 7", "3 columns where the first line has 4"]),
    ):
        text = "".join("::".join(map(str, row)) + "\n" for row in RATED)
        (folder / "ratings.dat").write_text(text + line + "\n")
        message = refusal(DataError, "movielens", folder)
        assert all(each in message for each in said), message
    write = (folder / "ratings.dat").write_text
    write("1::1::5::7\n1::2::5::8\n1::3::5::9\n")
    (folder / "users.dat").write_text("1::F::1::2::3\n1::M::1::2::3\n")
    assert "'userId' are on more than one line, such as 1" in refusal(DataError, "movielens", folder)
    (folder / "movies.dat").write_text("1::A::B\n1::C::D\n")
    assert "more than one line, such as 1" in refusal(DataError, "movielens", folder)
    (folder / "movies.dat").unlink()
    assert "There is no file movies.dat" in refusal(DataError, "movielens", folder)


# ---------------------------------------------------------------- goodbooks


def write_goodbooks(folder: Path) -> Path:
    folder.mkdir()
    (folder / "ratings.csv").write_text("user_id,book_id,rating\n2,1,5\n1,3,4\n2,2,4\n1,1,5\n2,3,5\n1,2,2\n2,1,5\n")
    (folder / "books.csv").write_text(
        "book_id,goodreads_book_id,best_book_id,work_id,books_count,isbn,isbn13,authors,original_publication_year,"
        "original_title,title,language_code,average_rating,ratings_count\n"
        '1,100,100,9,2,043902348X,9.78e+12,"J.K. Rowling, Mary GrandPré",1997.0,HP,"HP, 1",eng,4.44,4602479\n'
        "2,200,200,9,2,,,Homer,-750.0,,Odyssey,,3.9,10\n"
        "3,300,300,9,2,,,Anon,,,Tales,en-US,4.0,11\n"
    )
    (folder / "tags.csv").write_text("tag_id,tag_name\n1,to-read\n2,fantasy\n3,classics\n4,magic\n5,owned\n")
    shelves = ["100,1,900", "100,2,70", "100,4,80", "200,1,800", "200,3,5", "300,1,3", "999,2,4"]
    shelves += ["100,5,60", "200,5,60"]
    (folder / "book_tags.csv").write_text("\n".join(["goodreads_book_id,tag_id,count", *shelves]) + "\n")
    (folder / "to_read.csv").write_text("user_id,book_id\n1,2\n1,1\n2,9\n1,2\n")
    return folder


def test_goodbooks_by_hand(tmp_path):
    """A line stands for its time; shelves of most books say nothing: "to-read" has all three, "owned" two."""
    folder = write_goodbooks(tmp_path / "raw")
    prepare("goodbooks", tmp_path / "out", {"data_dir": str(folder), "to_read": True})
    assert rows(tmp_path / "out", "test") == [{"user_id": 2, "positives": [3], "history": [1, 2]}]
    assert rows(tmp_path / "out", "valid") == [{"user_id": 2, "positives": [2], "history": [1]}]
    assert rows(tmp_path / "out", "train") == [
        {"user_id": 1, "item_id": 3, "history": []},
        {"user_id": 1, "item_id": 1, "history": [3]},
        {"user_id": 2, "item_id": 1, "history": []},
    ]
    first, second, third = rows(tmp_path / "out", "items")
    assert first == {
        "item_id": 1,
        "title": "HP, 1",
        "authors": ["J.K. Rowling", "Mary GrandPré"],
        "year": 1997,
        "language": "eng",
        "average_rating": 4.44,
        "rating_number": 4602479,
        "tags": ["magic", "fantasy"],
    }
    assert (second["year"], second["language"], second["tags"], third["tags"]) == (-750, None, ["classics"], [])
    # User 1 took 1 and rated 2 low: 2 alone is left to read. Book 9 is none.
    assert rows(tmp_path / "out", "users") == [{"user_id": 1, "to_read": [2]}, {"user_id": 2, "to_read": []}]


def test_goodbooks_with_fewer_columns_has_nulls(tmp_path):
    folder = write_goodbooks(tmp_path / "raw")
    (folder / "books.csv").write_text("book_id,title\n1,HP\n2,Odyssey\n3,Tales\n")
    assert "no column 'goodreads_book_id'" in refusal(DataError, "goodbooks", folder)
    prepare("goodbooks", tmp_path / "out", {"data_dir": str(folder), "max_tags": 0})
    first = rows(tmp_path / "out", "items")[0]
    assert first["title"] == "HP" and first["authors"] == [] and first["year"] is None


def test_what_goodbooks_needs_is_said(tmp_path):
    folder = write_goodbooks(tmp_path / "raw")
    assert "split" in refusal(ConfigError, "goodbooks", folder, split="time")
    (folder / "books.csv").write_text("id,book_id,title\n1,100,x\n")
    assert "no column 'goodreads_book_id'" in refusal(DataError, "goodbooks", folder)
    (folder / "ratings.csv").write_text("user_id,book_id,rating\n1,2,\n")
    assert "ratings.csv, line 2: 'rating' is null" in refusal(DataError, "goodbooks", folder)


# ---------------------------------------------------------------- a model of each, by the config that is shipped


def amazon_world(folder: Path) -> Path:
    """Readers keep to one writer out of six."""
    rng = np.random.default_rng(0)
    log, items = [], [f"I{number}" for number in range(60)]
    for user in range(80):
        liked = rng.permutation([item for item in range(60) if item % 6 == user % 6])[:8]
        log += [review(f"U{user}", items[item], 1 + 3.5 * step) for step, item in enumerate(liked)]
    books = [
        about(item, author={"name": f"W{number % 6}"}, price=None if number % 5 else "from 3.5")
        for number, item in enumerate(items[:55])
    ]
    return write_amazon(folder, log, books, gz=True)


def movielens_world(folder: Path) -> Path:
    folder.mkdir()
    rated = [(user, (user * 7 + step * 3) % 30 + 1, 5, 1000 + step) for user in range(40) for step in range(6)]
    for name, lines in {
        "ratings": rated,
        "movies": [(movie, f"Film ({1960 + movie})", "Drama|War") for movie in range(1, 31)],
        "users": [(user, "FM"[user % 2], 25, 3, "1") for user in range(40)],
    }.items():
        (folder / f"{name}.dat").write_text("".join("::".join(map(str, line)) + "\n" for line in lines))
    return folder


def goodbooks_world(folder: Path) -> Path:
    write_goodbooks(folder)
    with (folder / "books.csv").open("a") as file:
        file.writelines(f"{book},{book}00,{book},9,2,,,Anon,1990.0,,T,eng,4.0,11\n" for book in range(4, 13))
    lines = [f"{user},{(user + step) % 12 + 1},5" for step in range(5) for user in range(36)]
    (folder / "ratings.csv").write_text("\n".join(["user_id,book_id,rating", *lines]) + "\n")
    return folder


@pytest.mark.parametrize(
    ("source", "config", "world", "options"),
    [
        ("amazon-reviews", "amazon_books", amazon_world, {**SPLIT, "category": "Books"}),
        ("movielens", "movielens", movielens_world, {}),
        ("goodbooks", "goodbooks", goodbooks_world, {}),
    ],
)
def test_the_shipped_config_trains_on_what_was_prepared(cli, tmp_path, source, config, world, options):
    raw, data, run = world(tmp_path / "raw"), tmp_path / "data", tmp_path / "run"
    told = [f"{name}={value}" for name, value in options.items()]
    said = cli("prepare", source, "--out", data, f"data_dir={raw}", *told)
    assert said.code == 0, said.err
    overrides = [f"data.dataset={data}", f"run_dir={run}", "data.batch_size=30", "train.epochs=2", "train.log_every=1"]
    overrides += [
        "loss.negatives.sampled=8",
        "train.optimizer.warmup_steps=1",
        "evaluate.k=[2]",
        "evaluate.best=recall@2",
    ]
    if source == "amazon-reviews":
        overrides += ["tables.item.buckets=4096", "tables.author.buckets=512", "item.store.buckets=512"]
        overrides += ["item.title.buckets=512", "item.publisher.buckets=64", "item.categories.buckets=64"]
    said = cli("train", CONFIGS / f"{config}.yaml", *overrides)
    assert said.code == 0, said.err
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert len(losses) >= 2 and np.isfinite(losses).all() and losses[-1] < losses[0]
