"""Convert ratings into a log of interactions: ratings of at least `min_rating` are positives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import duckdb

from trec_twotower.data.sources.event_logs.event_log import Fault, refuse_faults
from trec_twotower.data.sources.public_options import RatingOptions
from trec_twotower.data.sources.tables.csv_files import CsvFiles, CsvLayout
from trec_twotower.data.sources.tables.event_files import (
    Files,
    explained,
    fetch_row,
    fetch_rows,
    scratch_dir_of,
    sql_name,
)
from trec_twotower.data.sources.tables.table_columns import note
from trec_twotower.errors import ConfigError, DataError, nearest


def load_ratings(
    database: duckdb.DuckDBPyConnection,
    options: RatingOptions,
    files: Files,
    columns: dict[str, str],
    faults: list[Fault],
    *,
    only: str = "",
) -> dict[str, int]:
    """Make the table `events` from `columns` (SQL expressions by name, among them `rating`).

    DataError names the first row with one of the `faults`, whichever its rating; `only` is a further SQL condition.
    """
    selected = ", ".join(f"{expression} AS {sql_name(name)}" for name, expression in columns.items())
    with explained(f"{files.option} = {files.path}", options):
        fetch_rows(database, f"CREATE TABLE events AS SELECT {selected} FROM {files.relation}")
    read = refuse_faults(database, files, columns, faults)
    fetch_rows(
        database,
        "CREATE TABLE positive_events AS SELECT user_id, item_id, timestamp FROM events "
        f"WHERE rating >= {options.min_rating}{only}",
    )
    fetch_rows(database, "DROP TABLE events")
    fetch_rows(database, "ALTER TABLE positive_events RENAME TO events")
    (positives,) = fetch_row(database, "SELECT count(*) FROM events")
    if not positives:
        raise ConfigError(f"min_rating = {options.min_rating:g}: none of {read:,} ratings reaches it: lower it.")
    return {"ratings_read": read, "not_positive": read - positives}


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of these files that exists. Raise DataError if none does."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    siblings = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    raise DataError(f"There is no file {' or '.join(names)} in {folder}{nearest(names[0], siblings)}.")


def read_csv(
    database: duckdb.DuckDBPyConnection, path: Path, layout: CsvLayout, wanted: Sequence[str], option: str
) -> Files:
    """Return a file as text columns, with nulls for missing columns of `wanted`. An empty file is a DataError."""
    csv = CsvFiles((path,), layout, scratch_dir_of(database)).with_one_line_end()
    if path not in csv.heads:
        raise DataError(f"{path} is empty.")
    types = dict.fromkeys(csv.heads[path].names, "VARCHAR")
    files = Files(option, str(path), csv.relation(), types, place=csv.place)
    lacking = [name for name in wanted if name not in types]
    if not lacking:
        return files
    note(f"{path} has no {', '.join(lacking)}: null in all rows.")
    nulls = ", ".join(f"CAST(NULL AS VARCHAR) AS {sql_name(name)}" for name in lacking)
    return replace(files, relation=f"(SELECT *, {nulls} FROM {files.relation})")


def whole_number(column: str) -> str:
    """Return an SQL expression that parses text as a whole number; NULL if it is none."""
    return f"CASE WHEN regexp_full_match(trim({column}), '-?[0-9]+') THEN try_cast({column} AS BIGINT) END"


def top_tags(database: duckdb.DuckDBPyConnection, counted: str, max_tags: int) -> None:
    """Make the table `item_tags` (item_id, tags): of `counted`, a selection of item_id, tag and times, the most given.

    A tag of more than half of the tagged items ("to-read") carries no information and is left out.
    """
    fetch_rows(database, f"CREATE TABLE counted_tags AS {counted}")
    fetch_rows(
        database,
        "CREATE TABLE item_tags AS SELECT item_id, list(tag ORDER BY times DESC, tag) AS tags FROM ("
        "SELECT * FROM counted_tags ANTI JOIN (SELECT tag FROM counted_tags GROUP BY tag HAVING count(*) > 0.5 * "
        "(SELECT count(DISTINCT item_id) FROM counted_tags)) USING (tag) "
        f"QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY times DESC, tag) <= {max_tags}) GROUP BY item_id",
    )


def refuse_doubles(database: duckdb.DuckDBPyConnection, options: RatingOptions, files: Files, column: str) -> None:
    """Raise DataError if ids of a file are repeated or are not integers."""
    number = whole_number(column)
    with explained(f"{files.option} = {files.path}", options):
        bad, count, first = fetch_row(
            database,
            "SELECT count(*) FILTER (id IS NULL), count(*) FILTER (id IS NOT NULL AND times > 1), "
            "min(id) FILTER (times > 1) FROM "
            f"(SELECT {number} AS id, count(*) AS times FROM {files.relation} GROUP BY id)",
        )
    if bad:
        raise files.refuse(database, column, f"{number} IS NULL", bad, "ids are whole numbers")
    if count:
        raise DataError(
            f"{files.path}: {count:,} ids of {column!r} are on more than one line, such as {first}: keep one."
        )
