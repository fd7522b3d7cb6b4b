r"""MovieLens (GroupLens), in its three layouts: u.data (100 K), files that end in .dat (1 M, 10 M) and .csv (20 M on).

By the READMEs of ml-100k, ml-1m, ml-10m and ml-25m; .csv has a header, the others have none:

    u.data   UserID \t MovieID \t Rating \t Timestamp
    u.item   MovieID|Title|ReleaseDate|VideoDate|Url|unknown|Action|...   (19 flags of genres)
    u.user   UserID|Age|Gender|Occupation|Zip

    ratings.dat  UserID::MovieID::Rating::Timestamp      ratings.csv  userId,movieId,rating,timestamp
    movies.dat   MovieID::Title::Genres                  movies.csv   movieId,title,genres
    users.dat    UserID::Gender::Age::Occupation::Zip    (1M alone; Age is the first year of a range)
    tags.dat     UserID::MovieID::Tag::Timestamp         tags.csv     userId,movieId,tag,timestamp  (10M on)

Ratings are 1 to 5 stars, or 0.5 to 5 in halves; times are seconds since 1970. A title ends in its year, in brackets;
genres are joined by `|`, or "(no genres listed)". .csv is UTF-8, .dat UTF-8 (10M) or Latin-1 (1M), u.item Latin-1.
Movies and users may have fewer columns (in .dat those on the left): the dataset has nulls in place of the others.

With split = time only tags given before `valid_from` count; with leave-last-out all do, also later ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from trec_twotower.data.sources.event_logs.event_log import write_log
from trec_twotower.data.sources.public_options import MovielensOptions as Options
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
    LATEST_US,
    Files,
    explained,
    fetch_row,
    fetch_rows,
    sql_name,
    sql_text,
    to_microseconds,
)
from trec_twotower.data.sources.tables.table_columns import note
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import DataError

COLUMNS = {
    "ratings": ("userId", "movieId", "rating", "timestamp"),
    "movies": ("movieId", "title", "genres"),
    "users": ("userId", "gender", "age", "occupation", "zip"),
    "tags": ("userId", "movieId", "tag", "timestamp"),
}
GENRES: tuple[str, ...] = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
)
GENRES += ("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")


@dataclass(frozen=True)
class Layout:
    """File names, separators and columns of a release, by kind of file."""

    names: dict[str, str]
    separators: dict[str, str]
    columns: dict[str, tuple[str, ...]]
    has_header: bool = False

    def find(self, folder: Path, kind: str) -> Path | None:
        path = folder / self.names.get(kind, "")
        return path if path.is_file() else None


DAT = Layout({kind: f"{kind}.dat" for kind in COLUMNS}, dict.fromkeys(COLUMNS, "::"), COLUMNS)
CSV = Layout({kind: f"{kind}.csv" for kind in COLUMNS}, dict.fromkeys(COLUMNS, ","), COLUMNS, has_header=True)
FLAGS = tuple(f"genre {number}" for number in range(len(GENRES)))
OF_100K = Layout(
    {"ratings": "u.data", "movies": "u.item", "users": "u.user"},
    {"ratings": "\t", "movies": "|", "users": "|"},
    {
        "ratings": COLUMNS["ratings"],
        "movies": ("movieId", "title", "released", "video", "url", *FLAGS),
        "users": ("userId", "age", "gender", "occupation", "zip"),
    },
)


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test, items and, where the release has them, users; return the content of dataset.yaml."""
    folder = options.folder("movielens")
    layouts = {layout.names["ratings"]: layout for layout in (DAT, CSV, OF_100K)}
    layout = layouts[find_file(folder, *layouts).name]

    def load_events(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        files = _read(database, layout, "ratings", folder / layout.names["ratings"])
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
        _load_items(database, options, layout, find_file(folder, layout.names["movies"]), layout.find(folder, "tags"))
        (nameless,) = fetch_row(database, "SELECT count(*) FROM items WHERE title IS NULL")
        users = layout.find(folder, "users")
        if users is not None:
            _load_users(database, options, layout, users)
        return {"items_without_title": nameless}

    return write_log("movielens", options, writer, load_events, load_sides)


def _read(database: duckdb.DuckDBPyConnection, layout: Layout, kind: str, path: Path) -> Files:
    """Return the columns of a file as text, named as in the .csv layout. Missing columns are null.

    The u.data of some mirrors mixes LF and CRLF.
    """
    separator, encoding = layout.separators[kind], _encoding(path, kind)
    fields = _first_line(path, encoding).split(separator)
    wanted = layout.columns[kind]
    names = tuple(fields) if layout.has_header else wanted[: len(fields)]
    needed = wanted if kind == "ratings" else wanted[:1]
    if not set(needed) <= set(names) or len(names) < len(fields):
        raise DataError(
            f"{path} begins with {separator.join(fields)!r}, where MovieLens has {separator.join(wanted)!r}."
        )
    form = CsvLayout(separator, '"' if layout.has_header else "", layout.has_header, names, encoding)
    return read_csv(database, path, form, wanted, kind)


def _first_line(path: Path, encoding: str) -> str:
    with path.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors="replace") as file:
        return file.readline().rstrip("\r\n")


def _encoding(path: Path, kind: str) -> str:
    """Return the DuckDB name of the encoding. Ratings are digits, which are equal in both encodings."""
    if kind == "ratings":
        return "utf-8"
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _genres(layout: Layout) -> str:
    """Return an SQL expression for the genres of a movie as a list."""
    if layout is not OF_100K:
        return "list_filter(string_split(coalesce(genres, ''), '|'), lambda x: x NOT IN ('', '(no genres listed)'))"
    flags = zip(FLAGS[1:], GENRES[1:], strict=True)  # the first is "unknown"
    named = ", ".join(f"CASE WHEN {sql_name(flag)} = '1' THEN {sql_text(genre)} END" for flag, genre in flags)
    return f"list_filter([{named}], lambda x: x IS NOT NULL)"


def _load_users(database: duckdb.DuckDBPyConnection, options: Options, layout: Layout, path: Path) -> None:
    """Make the table `users`, unless the file is that of another data set with the same names of files."""
    files = _read(database, layout, "users", path)
    (others,) = fetch_row(
        database, f"SELECT count(*) FROM {files.relation} WHERE gender IS NOT NULL AND gender NOT IN ('F', 'M')"
    )
    if others:
        note(f"{path} is left out: its columns are not those of MovieLens ({', '.join(layout.columns['users'])}).")
        return
    refuse_doubles(database, options, files, "userId")
    occupation = "occupation" if layout is OF_100K else whole_number("occupation")  # names in 100K, codes in 1M
    fetch_rows(
        database,
        "CREATE TABLE users AS SELECT * FROM (SELECT DISTINCT user_id FROM kept) LEFT JOIN (SELECT "
        f"{whole_number('userId')} AS user_id, gender, {whole_number('age')} AS age, "
        f"{occupation} AS occupation, zip FROM {files.relation}) USING (user_id)",
    )


def _load_items(
    database: duckdb.DuckDBPyConnection, options: Options, layout: Layout, movies_path: Path, tags: Path | None
) -> None:
    """Make the table `items`: title, year, genres and tags of each rated movie."""
    movies = _read(database, layout, "movies", movies_path)
    refuse_doubles(database, options, movies, "movieId")
    with explained(f"movies = {movies_path}", options):
        fetch_rows(
            database,
            f"CREATE TABLE movie_rows AS SELECT {whole_number('movieId')} AS item_id, title, "
            r"try_cast(nullif(regexp_extract(title, '\((\d{4})\)\s*$', 1), '') AS INTEGER) AS year, "
            f"{_genres(layout)} AS genres FROM {movies.relation}",
        )
    if tags is None or not options.max_tags:
        selected, joined = "*", ""
    else:
        files = _read(database, layout, "tags", tags)
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
        f"LEFT JOIN movie_rows USING (item_id){joined}",
    )
