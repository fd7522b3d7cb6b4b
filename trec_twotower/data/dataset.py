"""A dataset folder: which files, how many rows, which columns; read by row group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config import read_yaml
from trec_twotower.data.hashing import is_id
from trec_twotower.errors import ConfigError, DataError, nearest

USER_ID, ITEM_ID, POSITIVES, HISTORY = "user_id", "item_id", "positives", "history"
UNREADABLE = (OSError, pa.ArrowException, KeyError, UnicodeDecodeError)  # what pyarrow raises for damaged files


@dataclass(frozen=True)
class RowGroup:
    """A run of rows that is decoded together, and where it stands among all rows of its split."""

    path: Path
    number: int  # within the file
    first_row: int  # within the split
    num_rows: int

    def __str__(self) -> str:
        """Where a row that an error names is counted from."""
        return f"{self.path}, row group {self.number}"


class Split:
    """The Parquet files of one folder as one table; raises DataError for files that are not what they should be."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.row_groups: list[RowGroup] = []
        self.columns: dict[str, pa.DataType] = {}
        paths = sorted(folder.glob("*.parquet"))
        if not paths:
            raise DataError(f"{folder} holds no *.parquet files: run `trec-twotower prepare`, or put them there.")
        first_row = 0
        for path in paths:
            file = _open(path)
            self._agree(path, file.schema_arrow)
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            if sum(sizes) != file.metadata.num_rows:  # no checksum covers the footer
                raise DataError(
                    f"{path} is damaged: its row groups have {sum(sizes):,} rows, the file {file.metadata.num_rows:,}: "
                    "make it again."
                )
            for number, num_rows in enumerate(sizes):
                if num_rows:
                    self.row_groups.append(RowGroup(path, number, first_row, num_rows))
                first_row += num_rows
        self.num_rows = first_row
        if not self.num_rows:
            raise DataError(f"{folder} has {len(paths)} files but not one row: there is nothing to read.")

    def _agree(self, path: Path, schema: pa.Schema) -> None:
        """All files have the first one's columns; order and further columns are free."""
        found = {field.name: field.type for field in schema}
        if not self.columns:
            self.columns = found
            return
        for name, kind in self.columns.items():
            if name not in found:
                raise DataError(f"{path} has no column {name!r}, which the other files of {self.folder} have.")
            if found[name] != kind:
                raise DataError(
                    f"{path}: column {name!r} is {found[name]}, but {kind} in the first file of {self.folder}: "
                    "write all files with one type."
                )

    def has(self, column: str) -> bool:
        return column in self.columns

    def require(self, column: str, why: str) -> pa.DataType:
        """The column's type; raises ConfigError when the split has no such column."""
        if column not in self.columns:
            raise ConfigError(
                f"{self.folder} has no column {column!r}, which {why}{nearest(column, self.columns)}: "
                "correct the config, or write the column."
            )
        return self.columns[column]

    def read(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """One row group, its columns each in one chunk."""
        try:
            table = _open(group.path).read_row_group(group.number, columns=list(columns), use_threads=False)
            return table.select(columns).combine_chunks()
        except UNREADABLE as error:
            raise DataError(f"{group}: cannot be read: {error}") from None

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[RowGroup, pa.Table]]:
        for group in self.row_groups:
            yield group, self.read(group, columns)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """The whole split, in memory."""
        return pa.concat_tables(table for _, table in self.tables(columns)).combine_chunks()


class Dataset:
    """The folder that `prepare`, or anything else that writes Parquet, has made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise DataError(f"There is no dataset folder {folder}{nearest(folder.name, near)}: make it with `prepare`.")
        for name in ("train", "items"):
            if not (folder / name).is_dir():
                raise DataError(f"{folder} is no dataset: it has no folder {name}/ (it needs train/ and items/).")

    @cached_property
    def train(self) -> Split:
        split = self.split("train")
        self._check_ids(split, USER_ID)
        return split

    @cached_property
    def items(self) -> Split:
        split = self.split("items")
        self._check_ids(split, ITEM_ID)
        return split

    @cached_property
    def users(self) -> Split | None:
        if not (self.folder / "users").is_dir():
            return None
        split = self.split("users")
        self._check_ids(split, USER_ID)
        return split

    def has(self, name: str) -> bool:
        return (self.folder / name).is_dir()

    def split(self, name: str) -> Split:
        if not self.has(name):
            parts = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
            raise DataError(f"{self.folder} has no part {name!r}{nearest(name, parts)}.")
        return Split(self.folder / name, name)

    @cached_property
    def description(self) -> dict[str, Any]:
        """dataset.yaml, or nothing where somebody else made the folder."""
        path = self.folder / "dataset.yaml"
        return read_yaml(path) or {} if path.is_file() else {}

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that change when the data do: names and sizes of all files, and dataset.yaml's digests."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*.parquet")):
            digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}\n".encode())
        for name, facts in sorted(self.description.get("files", {}).items()):
            digest.update(f"{name} {facts.get('sha256')}\n".encode())
        return digest.hexdigest()[:12]

    @staticmethod
    def _check_ids(split: Split, column: str) -> None:
        if column not in split.columns:
            raise DataError(
                f"{split.folder} has no column {column!r}{nearest(column, split.columns)}: every row must name its "
                f"{column.removesuffix('_id')}."
            )
        if not is_id(split.columns[column]):
            raise DataError(
                f"{split.folder}: column {column!r} is {split.columns[column]}, but ids are integers or text: cast it."
            )


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        assert file.schema_arrow is not None  # decodes the names, which may be damaged as well
        return file
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
