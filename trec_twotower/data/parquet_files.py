"""The Parquet files of a part of a dataset: where they are, which of them count, and their footers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from trec_twotower.data.table_formats import refuse_table_format
from trec_twotower.errors import ConfigError, DataError, nearest

UNREADABLE = (OSError, pa.ArrowException, KeyError, UnicodeDecodeError)  # what pyarrow raises for damaged files


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a part, in the order of their rows; names with . or _ first are a writer's own.

    Raises DataError for a file name that is not UTF-8, which neither messages nor manifests can contain.
    """
    found = [path for path in folder.glob("*.parquet") if path.name[0] not in "._"]
    for path in found:
        if not path.name.isascii() and (name := os.fsencode(path.name)).decode(errors="replace").encode() != name:
            raise DataError(f"{folder} has a file whose name is not UTF-8: {name!r}. Rename it.")
    return sorted(path for path in found if hasattr(path, "fs") or not path.is_dir())


def refuse_other_endings(folder: Path) -> None:
    """Raise DataError where a part has Parquet files that do not end with .parquet, which would not be read."""
    for path in sorted(folder.iterdir()):
        ending = path.name.rpartition(".")[2]
        if path.name[0] not in "._" and ending != "parquet" and ending.lower() in ("parquet", "parq", "pq"):
            raise DataError(
                f"{path} is ignored, because its name does not end with .parquet: rename it, or move it away."
            )


def parquet_below(folder: Path) -> Iterator[Path]:
    """Yield the Parquet files in subfolders of a part, also through links, except names that start with . or _."""
    if hasattr(folder, "fs"):  # one request lists all; object stores have no links
        below = (path for path in sorted(folder.rglob("*.parquet")) if path.parent != folder)
    else:
        folders = (path for path in sorted(folder.iterdir()) if path.is_dir())
        below = (path for each in folders for path in sorted(each.rglob("*.parquet")))
    yield from (path for path in below if str(path.relative_to(folder))[0] not in "._")


def refuse_tables(folder: Path) -> None:
    """Raise DataError where a part's folder is a table of Delta Lake or the like, or the folder of a table's files."""
    place = folder if hasattr(folder, "fs") else folder.resolve()  # train/ may be a link to the files of a table
    refuse_table_format(folder)
    refuse_table_format(place.parent)


def refuse_partitions(folder: Path) -> None:
    """Raise DataError if a folder that grows has files in Hive partitions, which would be ignored."""
    for path in sorted(folder.iterdir()):
        if "=" in path.name and path.is_dir() and any(path.rglob("*.parquet")):
            raise DataError(
                f"{folder} has files in the partition {path.name}: a part must not have subfolders. Write them "
                f"into {folder} itself, with {path.name.partition('=')[0]!r} as a column."
            )


def size_of(path: Path) -> int:
    """Return a file's bytes; raises DataError where it is a link to nothing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is a link to {path.resolve()}, which is not there: bring that file back.") from None


def encoded_texts(file: pq.ParquetFile) -> set[str]:
    """Return the paths of text columns (or list elements) that are dictionary-encoded in the first row group."""
    if not file.metadata.num_row_groups:
        return set()
    chunks = file.metadata.row_group(0)
    leaves = (file.schema.column(number) for number in range(len(file.schema)))
    return {
        leaf.path
        for number, leaf in enumerate(leaves)
        if leaf.logical_type.type == "STRING" and chunks.column(number).has_dictionary_page
    }


def footer_digest(path: Path) -> str:
    """Return "xxh3-" and the XXH3-64 of the footer of a Parquet file."""
    with path.open("rb") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(num_bytes - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(num_bytes - 8 - length, 0))
        return f"xxh3-{xxhash.xxh3_64_hexdigest(file.read())}"


def rows_if_whole(path: Path) -> int | None:
    """Return the number of rows of a Parquet file; None if its footer is not readable, as while it is being written."""
    try:
        return open_parquet(path).metadata.num_rows
    except DataError:
        return None


_LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "hdfs": "pyarrow"}


def folder_of(place: Path | str) -> Path:
    """Return a local folder, or one at a URL that fsspec knows (s3://..., gs://..., memory://...).

    Raises ConfigError for a scheme that is unknown, or whose library is not installed.
    """
    if isinstance(place, str) and "://" in place:
        from upath import UPath

        scheme = place.partition("://")[0]
        try:
            there: Any = UPath(place)  # has the methods of a Path
            _ = there.fs
        except ImportError as error:
            library = _LIBRARIES.get(scheme)
            fix = f"pip install {library}" if library else "install the library that it needs"
            raise ConfigError(
                f"The dataset is {place}, but the library for {scheme}:// is not installed ({error}): {fix}."
            ) from None
        except ValueError:
            raise ConfigError(
                f"The dataset is {place}, but fsspec knows no {scheme}://{nearest(scheme, _LIBRARIES)}: give a folder, "
                "or a URL with a known scheme."
            ) from None
        return there
    return Path(place)


def open_parquet(path: Path, dictionaries: Iterable[str] = (), footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open a Parquet file, memory-mapped if it is local; page checksums are verified if there are any."""
    is_here = not hasattr(path, "fs")
    try:
        file = pq.ParquetFile(
            path if is_here else path.open("rb"),
            metadata=footer,
            memory_map=is_here,
            page_checksum_verification=True,
            read_dictionary=list(dictionaries),
        )
        assert file.schema_arrow is not None  # decodes the column names, which may be damaged
        return file
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
