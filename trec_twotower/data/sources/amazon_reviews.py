r"""Amazon Reviews (McAuley Lab): reviews and item metadata as JSON lines, one file per category, of any size.

The layout of 2023, by its documentation (https://amazon-reviews-2023.github.io and the card of
McAuley-Lab/Amazon-Reviews-2023; Hou et al. 2024, arXiv 2403.03952): `Books.jsonl` has one review per line,

    rating             1.0 to 5.0
    title, text        of the review
    images             a list
    asin, parent_asin  the product, and the one that its variants (colours, sizes, formats) share: the key of metadata
    user_id            text
    timestamp          milliseconds since 1970
    verified_purchase  true or false
    helpful_vote       a count

and `meta_Books.jsonl` has one item per line (some reviewed items have no line):

    parent_asin        the key
    title, subtitle    text
    main_category      of Amazon, such as "Books"
    categories         a list from wide to narrow
    store              of books often the writer with his role
    author             of books: null or {"avatar": ..., "name": ..., "about": [...]}; in copies also text
    price              US dollars at crawling: a number, null, or text such as "from 5.99", "None", "—"
    average_rating     shown on the page at crawling (2023)
    rating_number      how many ratings that were
    features, description   lists of text
    details            names and values, such as "Publisher": "Scholastic Press (October 1, 2004)"
    images, videos, bought_together   not read

The layout of 2018 (and 2014), by https://nijianmo.github.io/amazon: `Books.json` or `Books_5.json` has reviews with

    overall            1.0 to 5.0
    asin               the product, and the key of metadata
    reviewerID         text
    unixReviewTime     seconds since 1970, of midnight
    verified           true or false (2018)

and `meta_Books.json` items with asin, title, brand, main_cat, category (in 2014 categories, a list of lists), price,
feature and description. The dataset has the columns of 2023, with null for what these do not have. The lines of 2014's
metadata are Python dicts, not JSON, and have to be converted.

All may be .gz. `average_rating` and `rating_number` are of 2023 and include the test period: `rating_number` reveals
how popular an item will be. They are in items/, but a model to be judged by a split in time should leave them out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb

from trec_twotower.data.sources.event_logs.event_log import write_log
from trec_twotower.data.sources.public_options import ReviewOptions as Options
from trec_twotower.data.sources.ratings import load_ratings
from trec_twotower.data.sources.tables.event_files import (
    FILE_OF_ROW,
    LATEST_US,
    Files,
    explained,
    fetch_row,
    fetch_rows,
    sql_name,
    to_microseconds,
)
from trec_twotower.data.sources.tables.raw_text import check_zipped, open_unzipped
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import DataError, nearest

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
EARLIEST_S = 10**8  # March 1973; earlier times are probably seconds read as milliseconds
# A JSON field may have a value of any type; the expressions below convert it where possible.
ITEM = dict.fromkeys(("parent_asin", "title", "subtitle", "main_category", "store"), "VARCHAR")
ITEM |= dict.fromkeys(
    ("author", "categories", "price", "average_rating", "rating_number", "features", "description", "details"), "JSON"
)
ITEM_2018 = dict.fromkeys(("asin", "title", "brand", "main_cat"), "VARCHAR")
ITEM_2018 |= dict.fromkeys(("category", "categories", "price", "feature", "description"), "JSON")
PUBLISHED = "details ->> '$.Publisher'"


@dataclass(frozen=True)
class Layout:
    """Field names of a review, and the unit of its timestamp."""

    user: str
    item: str
    time: str
    rating: str
    verified: str
    per_second: int
    unit: str

    @property
    def columns(self) -> dict[str, str]:
        names = dict.fromkeys((self.time, self.rating, self.verified), "JSON")
        return names | dict.fromkeys((self.user, self.item), "VARCHAR")


OF_2023 = Layout("user_id", "parent_asin", "timestamp", "rating", "verified_purchase", 1000, "milliseconds")
OF_2018 = Layout("reviewerID", "asin", "unixReviewTime", "overall", "verified", 1, "seconds")


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test and items; returns the content of dataset.yaml."""
    folder = options.folder("amazon-reviews")
    reviews, metadata = _find(folder, options)
    layout = OF_2018 if "reviewerID" in _first_object(reviews[0]) else OF_2023

    def load_events(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        files = _read(database, options, "reviews", folder, reviews, layout.columns)
        columns = {
            "user_id": f"nullif(trim({layout.user}), '')",
            "item_id": f"nullif(trim({layout.item}), '')",
            "timestamp": to_microseconds(f"try_cast({layout.time} ->> '$' AS BIGINT)", 1_000_000 // layout.per_second),
            "rating": f"try_cast({layout.rating} ->> '$' AS DOUBLE)",
            "verified": f"{layout.verified} ->> '$' = 'true'",
        }
        when = f"{{0}} IS NULL OR {{0}} < {EARLIEST_S * 1_000_000} OR {{0}} > {LATEST_US}"
        faults = [
            (layout.user, "user_id", "{} IS NULL", "remove these lines"),
            (layout.item, "item_id", "{} IS NULL", "remove these lines"),
            (layout.time, "timestamp", when, f"this layout has {layout.unit} since 1970 here"),
            (layout.rating, "rating", "coalesce(NOT isfinite({}), true)", "this layout has a number here"),
        ]
        only = " AND verified" if options.verified_only else ""
        return load_ratings(database, options, files, columns, faults, only=only)

    def load_sides(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        if not options.metadata:
            fetch_rows(database, "CREATE TABLE items AS SELECT DISTINCT item_id FROM kept")
            return {}
        if "parent_asin" in _first_object(metadata[0]):
            return _load_items(database, options, _read(database, options, "metadata", folder, metadata, ITEM))
        return _load_items(database, options, _read_2018(database, options, folder, metadata))

    return write_log("amazon-reviews", options, writer, load_events, load_sides)


def _find(folder: Path, options: Options) -> tuple[list[Path], list[Path]]:
    """Return the review files and the metadata files. Raise DataError if one is missing."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.endswith(ENDINGS)]
    found = [path for path in found if not path.name.startswith(("asin2category", "."))]
    if options.category is not None:
        stems = {options.category, f"meta_{options.category}"}
        known = sorted({path.name.split(".")[0] for path in found if not path.name.startswith("meta_")})
        if options.category not in known:
            stems.add(f"{options.category}_5")  # the 5-core files of the 2018 release
        found = [path for path in found if path.name.split(".")[0] in stems]
        if not found:
            raise DataError(
                f"{folder} has no files of category {options.category!r}{nearest(options.category, known)}."
            )
    reviews = [path for path in found if not path.name.startswith("meta_")]
    metadata = [path for path in found if path.name.startswith("meta_")]
    if not reviews:
        raise DataError(
            f"{folder} holds no reviews: they are named CATEGORY.jsonl or .jsonl.gz, such as Books.jsonl.gz."
        )
    if not metadata and options.metadata:
        raise DataError(
            f"{folder} holds {reviews[0].name}, but no metadata: put meta_{reviews[0].name} next to it, or set "
            "metadata=false for a catalogue of ids alone."
        )
    return reviews, metadata


def _first_object(path: Path) -> dict[str, Any]:
    """Return the first line of a file if it is a JSON object, which shows the layout. DuckDB refuses other lines."""
    check_zipped(path)
    with open_unzipped(path) as lines:
        try:
            first = json.loads(next((line for line in lines if line.strip()), b"null"))
        except ValueError:
            return {}
    return first if isinstance(first, dict) else {}


def _read_2018(database: duckdb.DuckDBPyConnection, options: Options, folder: Path, paths: list[Path]) -> Files:
    """Return the 2018 metadata with the column names of 2023."""
    files = _read(database, options, "metadata", folder, paths, ITEM_2018)
    nested = (
        "CASE json_type(categories, '$[0]') WHEN 'ARRAY' THEN to_json(categories ->> '$[*][*]') ELSE categories END"
    )
    columns = {
        "parent_asin": "asin",
        "title": "title",
        "main_category": "main_cat",
        "store": "brand",
        "categories": f"coalesce(category, {nested})",
        "price": "price",
        "features": "feature",
        "description": "description",
        sql_name(FILE_OF_ROW): sql_name(FILE_OF_ROW),
    }
    columns |= {name: f"CAST(NULL AS {kind})" for name, kind in ITEM.items() if name not in columns}
    selected = ", ".join(f"{expression} AS {name}" for name, expression in columns.items())
    return replace(files, relation=f"(SELECT {selected} FROM {files.relation})")


def _read(
    database: duckdb.DuckDBPyConnection,
    options: Options,
    option: str,
    folder: Path,
    paths: list[Path],
    columns: dict[str, str],
) -> Files:
    typed = ", ".join(f"{name}: '{kind}'" for name, kind in columns.items())
    how = f"format = 'newline_delimited', columns = {{{typed}}}"
    return Files.read(database, options, option, str(folder), paths, "read_json", how)


def _load_items(database: duckdb.DuckDBPyConnection, options: Options, files: Files) -> dict[str, int]:
    """Make the table `items`; of two lines on one item, the one with more ratings counts."""
    about = {
        "title": _text("title"),
        "subtitle": _text("subtitle"),
        "main_category": _text("main_category"),
        "store": _text("store"),
        "author": "CASE json_type(author) WHEN 'OBJECT' THEN author ->> '$.name' "
        "WHEN 'VARCHAR' THEN coalesce(try_cast(author ->> '$' AS JSON) ->> '$.name', nullif(author ->> '$', '')) END",
        "publisher": rf"nullif(trim(regexp_replace(split_part({PUBLISHED}, ';', 1), '\([^)]*\)\s*$', '')), '')",
        "year": r"try_cast(nullif(regexp_extract(coalesce("
        rf"""{PUBLISHED}, details ->> '$."Publication date"', details ->> '$."Date First Available"'), """
        r"'((?:1[5-9]|20)\d\d)\D*$', 1), '') AS INTEGER)",
        "categories": _texts("categories"),
        "price": r"try_cast(replace(regexp_extract(price ->> '$', '\d[\d,]*\.?\d*'), ',', '') AS DOUBLE)",
        "average_rating": "try_cast(average_rating ->> '$' AS DOUBLE)",
        "rating_number": "try_cast(rating_number ->> '$' AS BIGINT)",
    }
    if options.description_chars:
        joined = f"array_to_string(list_concat({_texts('features')}, {_texts('description')}), ' ')"
        about["description"] = f"nullif(left({joined}, {options.description_chars}), '')"
    selected = ", ".join(f"{expression} AS {name}" for name, expression in about.items())
    wanted = "" if options.all_items else "WHERE item_id IN (SELECT item_id FROM kept)"
    details = "CASE json_type(details) WHEN 'VARCHAR' THEN try_cast(details ->> '$' AS JSON) ELSE details END"
    with explained(f"metadata = {files.path}", options):
        fetch_rows(
            database,
            f"CREATE TABLE metadata_rows AS SELECT nullif(trim(parent_asin), '') AS item_id, {selected} "
            f"FROM (SELECT * REPLACE ({details} AS details) FROM {files.relation}) {wanted}",
        )
    order = "rating_number DESC NULLS LAST, title, price, store, hash(metadata_rows)"
    fetch_rows(
        database,
        "CREATE TABLE distinct_rows AS SELECT * FROM metadata_rows WHERE item_id IS NOT NULL "
        f"QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY {order}) = 1",
    )
    join = "FULL" if options.all_items else "LEFT"
    fetch_rows(
        database,
        "CREATE TABLE items AS SELECT * FROM (SELECT DISTINCT item_id FROM kept) "
        f"{join} JOIN distinct_rows USING (item_id)",
    )
    lines, nameless, once, without = fetch_row(
        database,
        "SELECT (SELECT count(*) FROM metadata_rows), (SELECT count(*) FROM metadata_rows WHERE item_id IS NULL), "
        "(SELECT count(*) FROM distinct_rows), "
        "(SELECT count(*) FROM (SELECT DISTINCT item_id FROM kept) ANTI JOIN distinct_rows USING (item_id))",
    )
    return {
        "items_without_metadata": without,
        "metadata_repeats_dropped": lines - nameless - once,
        "metadata_without_id_dropped": nameless,
    }


def _text(column: str) -> str:
    return f"nullif(trim({column}), '')"


def _texts(column: str) -> str:
    """Return a list of strings from a JSON list or a single string; an empty list for null."""
    return (
        f"CASE json_type({column}) WHEN 'ARRAY' THEN list_filter(CAST({column} AS VARCHAR[]), lambda x: x <> '') "
        f"WHEN 'VARCHAR' THEN [{column} ->> '$'] ELSE [] END"
    )
