r"""MovieLens (GroupLens), in both its layouts: files that end in .dat (100 K to 10 M ratings) and in .csv (20 M on).

By the READMEs of ml-1m, ml-10m and ml-25m, without header in .dat and with one in .csv:

    ratings.dat  UserID::MovieID::Rating::Timestamp      ratings.csv  userId,movieId,rating,timestamp
    movies.dat   MovieID::Title::Genres                  movies.csv   movieId,title,genres
    users.dat    UserID::Gender::Age::Occupation::Zip    (1M alone; Age is the first year of a range)
    tags.dat     UserID::MovieID::Tag::Timestamp         tags.csv     userId,movieId,tag,timestamp  (10M on)

Ratings are 1 to 5 stars, or 0.5 to 5 in halves; times are seconds since 1970. A title ends in its year, in brackets;
genres are joined by `|`, or "(no genres listed)". .csv is UTF-8, .dat UTF-8 (10M) or Latin-1 (1M).

With split = time only tags given before `valid_from` count; with leave-last-out all do, also later ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
from pydantic import Field

from trec_twotower.data.sources.event_files import LATEST_US, Files, explained, fetch_row, fetch_rows, to_microseconds
from trec_twotower.data.sources.event_log import write_log
from trec_twotower.data.sources.ratings import (
    RatingOptions,
    find_file,
    load_ratings,
    refuse_doubles,
    top_tags,
    whole_number,
)
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import DataError

COLUMNS = {
    "ratings": ("userId", "movieId", "rating", "timestamp"),
    "movies": ("movieId", "title", "genres"),
    "users": ("userId", "gender", "age", "occupation", "zip"),
    "tags": ("userId", "movieId", "tag", "timestamp"),
}


class Options(RatingOptions):
    """Which ratings count, and how they are split."""

    max_tags: int = Field(10, ge=0)  # an item's most given tags, where there are tags; 0 leaves them out


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test, items and, of ml-1m, users; returns the content of dataset.yaml."""
    folder = options.folder("movielens")
    ratings_path = find_file(folder, "ratings.dat", "ratings.csv")
    ending = ratings_path.suffix

    def load_events(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        files = _read(database, options, ratings_path)
        columns = {
            "user_id": whole_number("userId"),
            "item_id": whole_number("movieId"),
            "timestamp": to_microseconds(whole_number("timestamp"), 1_000_000),
            "rating": "try_cast(rating AS DOUBLE)",
        }
        faults = [
            ("userId", "user_id", "{} IS NULL", "ids are whole numbers"),
            ("movieId", "item_id", "{} IS NULL", "ids are whole numbers"),
            ("timestamp", "timestamp", f"{{0}} IS NULL OR {{0}} NOT BETWEEN 0 AND {LATEST_US}", "seconds since 1970"),
            ("rating", "rating", "coalesce(NOT isfinite({}), true)", "a rating is a number of stars"),
        ]
        return load_ratings(database, options, files, columns, faults)

    def load_sides(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        tags = folder / f"tags{ending}"
        _load_items(database, options, find_file(folder, f"movies{ending}"), tags if tags.is_file() else None)
        (nameless,) = fetch_row(database, "SELECT count(*) FROM items WHERE title IS NULL")
        users = folder / f"users{ending}"
        if users.is_file():
            files = _read(database, options, users)
            refuse_doubles(database, options, files, "userId")
            fetch_rows(
                database,
                "CREATE TABLE users AS SELECT * FROM (SELECT DISTINCT user_id FROM kept) LEFT JOIN (SELECT "
                f"{whole_number('userId')} AS user_id, gender, {whole_number('age')} AS age, "
                f"{whole_number('occupation')} AS occupation, zip FROM {files.relation}) USING (user_id)",
            )
        return {"items_without_title": nameless}

    return write_log("movielens", options, writer, load_events, load_sides)


def _read(database: duckdb.DuckDBPyConnection, options: Options, path: Path) -> Files:
    """A file's columns, all as text, under the names that the .csv layout has."""
    names = COLUMNS[path.stem]
    typed = ", ".join(f"'{name}': 'VARCHAR'" for name in names)
    how = f"columns = {{{typed}}}, auto_detect = false, nullstr = ''"
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            header = file.readline().strip().split(",")
        if tuple(header) != names:
            raise DataError(f"{path} begins with {','.join(header)!r}, where MovieLens has {','.join(names)!r}.")
        how += ", header = true, delim = ',', quote = '\"', escape = '\"'"
    else:
        how += f", header = false, delim = '::', quote = '', escape = '', encoding = '{_encoding(path)}'"
    return Files.read(database, options, path.stem, str(path), [path], "read_csv", how)


def _encoding(path: Path) -> str:
    """What DuckDB calls it: ratings are digits, which are the same in both."""
    if path.stem == "ratings":
        return "utf-8"
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _load_items(database: duckdb.DuckDBPyConnection, options: Options, movies_path: Path, tags: Path | None) -> None:
    """Make the table `items`: of each movie that was taken its title, year, genres and tags."""
    movies = _read(database, options, movies_path)
    refuse_doubles(database, options, movies, "movieId")
    with explained(f"movies = {movies_path}", options):
        fetch_rows(
            database,
            f"CREATE TABLE told AS SELECT {whole_number('movieId')} AS item_id, title, "
            r"try_cast(nullif(regexp_extract(title, '\((\d{4})\)\s*$', 1), '') AS INTEGER) AS year, "
            "list_filter(string_split(coalesce(genres, ''), '|'), lambda x: x NOT IN ('', '(no genres listed)')) "
            f"AS genres FROM {movies.relation}",
        )
    if tags is None or not options.max_tags:
        selected, joined = "*", ""
    else:
        files = _read(database, options, tags)
        before = f" AND {whole_number('timestamp')} < {options.valid_from}" if options.split == "time" else ""
        with explained(f"tags = {tags}", options):
            top_tags(
                database,
                f"SELECT {whole_number('movieId')} AS item_id, lower(trim(tag)) AS tag, "
                f"count(DISTINCT userId) AS times FROM {files.relation} WHERE trim(tag) <> ''{before} GROUP BY ALL",
                options.max_tags,
            )
        selected, joined = "* REPLACE (coalesce(tags, []) AS tags)", " LEFT JOIN item_tags USING (item_id)"
    fetch_rows(
        database,
        f"CREATE TABLE items AS SELECT {selected} FROM (SELECT DISTINCT item_id FROM kept) "
        f"LEFT JOIN told USING (item_id){joined}",
    )
