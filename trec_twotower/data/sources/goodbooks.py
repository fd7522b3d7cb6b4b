"""Source `goodbooks`: goodbooks-10k (Zajac 2017), six million ratings of ten thousand books, with shelf names.

By its README (https://github.com/zygmuntz/goodbooks-10k), CSV with a header each:

    ratings.csv    user_id,book_id,rating               1 to 5, sorted by time; there are no times
    books.csv      book_id,goodreads_book_id,best_book_id,work_id,books_count,isbn,isbn13,authors,
                   original_publication_year,original_title,title,language_code,average_rating,ratings_count,...
    book_tags.csv  goodreads_book_id,tag_id,count       how many readers have the book on a shelf of that name
    tags.csv       tag_id,tag_name
    to_read.csv    user_id,book_id                      what users mean to read

A rating's line gives its time: an earlier line is an earlier event. So the split is leave-last-out, and the
dataset has no `timestamp`. Shelves, averages and what is meant to be read are those of the day on which the data were
used, later than the held-out ratings; `to_read` (without the user's own ratings) is read on request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from trec_twotower.data.sources.event_logs.event_log import write_log
from trec_twotower.data.sources.public_options import GoodbooksOptions as Options
from trec_twotower.data.sources.ratings import (
    find_file,
    load_ratings,
    read_csv,
    refuse_doubles,
    top_tags,
    whole_number,
)
from trec_twotower.data.sources.tables.csv_files import CsvLayout
from trec_twotower.data.sources.tables.event_files import (
    Files,
    explained,
    fetch_row,
    fetch_rows,
)
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import DataError, nearest


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test, items and, with to_read, users; returns the content of dataset.yaml."""
    folder = options.folder("goodbooks")

    def load_events(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        files = _read(database, folder, "ratings.csv", ("user_id", "book_id", "rating"))
        columns = {
            "user_id": whole_number("user_id"),
            "item_id": whole_number("book_id"),
            "timestamp": "row_number() OVER ()",
            "rating": "try_cast(rating AS DOUBLE)",
        }
        faults = [
            ("user_id", "user_id", "{} IS NULL", "ids are whole numbers"),
            ("book_id", "item_id", "{} IS NULL", "ids are whole numbers"),
            ("rating", "rating", "coalesce(NOT isfinite({}), true)", "a rating is a number of stars"),
        ]
        fetch_rows(database, "SET preserve_insertion_order = true")  # the file is in time order
        counts = load_ratings(database, options, files, columns, faults)
        fetch_rows(database, "SET preserve_insertion_order = false")
        return counts

    def load_sides(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        _load_items(database, options, folder)
        if options.to_read:
            files = _read(database, folder, "to_read.csv", ("user_id", "book_id"))
            user, item = whole_number("user_id"), whole_number("book_id")
            with explained(f"to_read = {files.path}", options):
                fetch_rows(
                    database,
                    "CREATE TABLE users AS SELECT user_id, coalesce(to_read, []) AS to_read FROM "
                    "(SELECT DISTINCT user_id FROM kept) LEFT JOIN (SELECT user_id, list(item_id ORDER BY item_id) "
                    f"AS to_read FROM (SELECT DISTINCT {user} AS user_id, {item} AS item_id FROM {files.relation}) "
                    "ANTI JOIN events USING (user_id, item_id) SEMI JOIN items USING (item_id) "
                    "GROUP BY user_id) USING (user_id)",
                )
        (nameless,) = fetch_row(database, "SELECT count(*) FROM items WHERE title IS NULL")
        return {"items_without_title": nameless}

    return write_log("goodbooks", options, writer, load_events, load_sides)


def _read(
    database: duckdb.DuckDBPyConnection, folder: Path, name: str, wanted: Sequence[str], optional: Sequence[str] = ()
) -> Files:
    """Return the columns of a file as text. Missing `optional` columns are null, missing `wanted` ones a DataError."""
    path = find_file(folder, name)
    files = read_csv(database, path, CsvLayout(), optional, path.stem)
    for column in wanted:
        if column not in files.types:
            raise DataError(
                f"{path} has no column {column!r}{nearest(column, files.types)}: take the release of GitHub "
                "(zygmuntz/goodbooks-10k), whose columns are named so."
            )
    return files


def _load_items(database: duckdb.DuckDBPyConnection, options: Options, folder: Path) -> None:
    """Make the table `items`: columns of books.csv and the shelves of each rated book."""
    joined_by, others = ["goodreads_book_id"], ["authors", "title", "original_publication_year", "language_code"]
    others += ["average_rating", "ratings_count"]
    if options.max_tags:
        books = _read(database, folder, "books.csv", ["book_id", *joined_by], others)
    else:
        books = _read(database, folder, "books.csv", ["book_id"], [*joined_by, *others])
    refuse_doubles(database, options, books, "book_id")
    with explained(f"books = {books.path}", options):
        fetch_rows(
            database,
            f"CREATE TABLE book_rows AS SELECT {whole_number('book_id')} AS item_id, title, "
            "list_filter(string_split(coalesce(authors, ''), ', '), lambda x: x <> '') AS authors, "
            "try_cast(try_cast(original_publication_year AS DOUBLE) AS INTEGER) AS year, "
            "language_code AS language, try_cast(average_rating AS DOUBLE) AS average_rating, "
            f"{whole_number('ratings_count')} AS rating_number, {whole_number('goodreads_book_id')} AS goodreads_id "
            f"FROM {books.relation}",
        )
    selected, joined = "* EXCLUDE (goodreads_id)", ""
    if options.max_tags:
        shelves = _read(database, folder, "book_tags.csv", ("goodreads_book_id", "tag_id", "count"))
        names = _read(database, folder, "tags.csv", ("tag_id", "tag_name"))
        with explained(f"book_tags = {shelves.path}", options):
            top_tags(
                database,
                'SELECT item_id, tag_name AS tag, sum(try_cast("count" AS BIGINT)) AS times '
                f'FROM (SELECT {whole_number("goodreads_book_id")} AS goodreads_id, tag_id, "count" '
                f"FROM {shelves.relation}) JOIN book_rows USING (goodreads_id) "
                f"JOIN (SELECT tag_id, tag_name FROM {names.relation}) USING (tag_id) "
                "WHERE tag_name <> '' GROUP BY ALL",
                options.max_tags,
            )
        selected, joined = (
            "* EXCLUDE (goodreads_id) REPLACE (coalesce(tags, []) AS tags)",
            " LEFT JOIN item_tags USING (item_id)",
        )
    fetch_rows(
        database,
        f"CREATE TABLE items AS SELECT {selected} FROM (SELECT DISTINCT item_id FROM kept) "
        f"LEFT JOIN book_rows USING (item_id){joined}",
    )
