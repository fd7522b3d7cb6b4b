"""One part of a dataset directory: its Parquet files, columns, row groups and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.data.arrow_types import holds_null_alone, is_list, is_wider, plain_column, plain_type, widest
from trec_twotower.data.parquet_files import (
    UNREADABLE,
    encoded_texts,
    footer_digest,
    open_parquet,
    parquet_below,
    parquet_files,
    refuse_other_endings,
    refuse_tables,
)
from trec_twotower.errors import ConfigError, DataError, nearest

DESCRIPTION = "dataset.yaml"


FOOTERS = 64  # open files that are kept


@dataclass(frozen=True)
class RowGroup:
    """A row group, and its position among all rows of its split."""

    path: Path
    number: int  # index within the file
    first_row: int  # row within the split
    num_rows: int

    def __str__(self) -> str:
        """Return the location for error messages; rows are counted within the row group."""
        return f"{self.path}, row group {self.number}"


class Split:
    """The Parquet files of one folder as one table. Raises DataError for invalid files.

    `files` are the names and bytes of the selected files, in order; by default all files. `like` are the columns of
    earlier files, whose types these may not exceed. `footers` has the `footer_digest` of each file when it was written:
    pages have checksums, but with one flipped bit in a footer pyarrow may read other values or abort.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        files: Mapping[str, int] | None = None,
        like: Mapping[str, pa.DataType] | None = None,
        footers: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.row_groups: list[RowGroup] = []
        self.columns: dict[str, pa.DataType] = dict(like or {})
        self._is_settled = like is not None
        self._lacking: dict[str, Path] = {}  # columns that only some files have, with a file that lacks it
        self._bytes = {} if files is None else {folder / name: size for name, size in files.items()}
        self._opened: dict[Path, tuple[int, int]] = {}  # bytes and modification time of local files
        self._footers: dict[Path, pq.FileMetaData] = {}  # reads of many row groups would be slow
        self._texts: set[str] = set()  # text columns that are dictionary-encoded
        paths = self._side_by_side() if files is None else list(self._bytes)
        if not paths:
            raise DataError(f"{folder} contains no *.parquet files: run `trec-twotower prepare`, or add them.")
        first_row = 0
        for path in paths:
            self._check_bytes(path)
            if footers is not None and path.name in footers and footer_digest(path) != footers[path.name]:
                raise DataError(
                    f"{path} differs from {folder.parent / DESCRIPTION} (other footer): it is damaged, or "
                    f"was rewritten; create the dataset again, or remove {DESCRIPTION}."
                )
            file = open_parquet(path)
            self._agree(path, file.schema_arrow)
            self._texts |= encoded_texts(file)
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            if sum(sizes) != file.metadata.num_rows:  # no checksum covers the footer
                raise DataError(
                    f"{path} is damaged: its row groups have {sum(sizes):,} rows, the file {file.metadata.num_rows:,}: "
                    "create it again."
                )
            for number, num_rows in enumerate(sizes):
                if num_rows:
                    self.row_groups.append(RowGroup(path, number, first_row, num_rows))
                first_row += num_rows
        self.num_rows = first_row
        if not self.num_rows:
            raise DataError(f"{folder} has {len(paths)} files but no rows: there is nothing to read.")

    def _side_by_side(self) -> list[Path]:
        """Return the files of the part. Raises DataError if there are files in subfolders, as in Hive partitions."""
        refuse_tables(self.folder)
        refuse_other_endings(self.folder)
        for path in parquet_below(self.folder):
            raise DataError(
                f"{self.folder} has {path.relative_to(self.folder)} in a subfolder, but a part must not have "
                "subfolders. Move the files up, or remove them. A value in a folder name must become a column."
            )
        return parquet_files(self.folder)

    def _agree(self, path: Path, schema: pa.Schema) -> None:
        """Check that all files have the same columns, in any order, with types of one kind."""
        found = {field.name: plain_type(field.type) for field in schema}
        if len(found) < len(schema):
            double = next(name for name in found if schema.names.count(name) > 1)
            raise DataError(
                f"{path} has {schema.names.count(double)} columns named {double!r}: give each its own name."
            )
        if not self.columns:
            self.columns = found
            self._first = path
            return
        if not self._is_settled:
            self._lacking |= {name: self._lacking.get(name, self._first) for name in found if name not in self.columns}
        for name, kind in list(self.columns.items()):
            if name not in found and self._is_settled:
                raise DataError(f"{path} has no column {name!r}, which the other files of {self.folder} have.")
            if name not in found:
                self._lacking[name] = path
                del self.columns[name]
                continue
            wide = widest(kind, found[name])
            if wide is not None and self._is_settled and is_wider(wide, kind):
                raise DataError(
                    f"{path}: column {name!r} is {found[name]}, but {kind} in the files that this run began with: "
                    f"write new files with {kind}."
                )
            if wide is not None:
                self.columns[name] = wide
            else:
                raise DataError(
                    f"{path}: column {name!r} is {found[name]}, but {kind} in the first file of {self.folder}: "
                    "write all files with one type."
                )

    def _check_bytes(self, path: Path) -> None:
        """Raise DataError for a file that is gone, has another size than recorded, or was changed.

        Changes are detected in local files only.
        """
        if path not in self._bytes:
            self._check_unchanged(path)
            return
        size: int | None = None
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
        if size != self._bytes[path]:
            now = "is gone" if size is None else f"has {size:,} bytes"
            raise DataError(
                f"{path} {now}, but had {self._bytes[path]:,} when this run read it: restore that file, or train "
                "into another run_dir."
            )
        self._check_unchanged(path)

    def _check_unchanged(self, path: Path) -> None:
        """Raise DataError for a local file that was replaced or rewritten since this process first opened it.

        Its rows would be read with the footer and in the order of the old file.
        """
        if not isinstance(path, PosixPath) or not path.is_file():
            return
        found = path.stat()
        if self._opened.setdefault(path, (found.st_size, found.st_mtime_ns)) != (found.st_size, found.st_mtime_ns):
            raise DataError(
                f"{path} was replaced or changed after this command opened it: a dataset must not change while "
                "it is read. Run the command again; an existing run needs the old file, or another run_dir."
            )

    def has(self, column: str) -> bool:
        """Return whether all files have the column. Raises DataError if only some have it."""
        if column in self._lacking:
            raise DataError(
                f"{self._lacking[column]} has no column {column!r}, which other files of {self.folder} have: write it "
                "into all files, or into none."
            )
        return column in self.columns

    def adopt_types(self, types: Mapping[str, pa.DataType]) -> None:
        """Read columns of nulls or of empty lists with these types of other parts."""
        for name, kind in self.columns.items():
            if name in types and holds_null_alone(kind):
                self.columns[name] = widest(kind, types[name]) or kind

    def require(self, column: str, why: str) -> pa.DataType:
        """Return the type of the column. Raises ConfigError if the split has no such column."""
        if not self.has(column):
            raise ConfigError(
                f"{self.folder} has no column {column!r}, which {why}{nearest(column, self.columns)}: "
                "correct the config, or write the column."
            )
        return self.columns[column]

    def read(self, group: RowGroup, columns: Sequence[str], *, dictionaries: bool = False) -> pa.Table:
        """Return one row group, each column in one chunk; with `dictionaries`, encoded text stays encoded."""
        [table] = self.blocks(group, columns, group.num_rows, dictionaries=dictionaries)
        return table

    def blocks(
        self, group: RowGroup, columns: Sequence[str], block_rows: int, *, dictionaries: bool = False
    ) -> Iterator[pa.Table]:
        """Yield the rows of `read` in blocks of `size` rows."""
        self._check_bytes(group.path)
        found = 0
        try:
            file = open_parquet(group.path, self._texts if dictionaries else (), self._footers.get(group.path))
            if len(self._footers) >= FOOTERS:
                self._footers.clear()
            self._footers[group.path] = file.metadata
            for block in _decoded(file, group, list(columns), block_rows):
                block = block.select(columns)
                table = pa.table({name: self._read(block[name], name, group, dictionaries) for name in columns})
                found += len(block)
                yield table
        except UNREADABLE as error:
            raise DataError(f"{group}{self._column_at_fault(group, columns)}: cannot be read: {error}") from None
        if found != group.num_rows:  # no checksum covers the footer
            raise DataError(f"{group} is damaged: it has {found:,} rows, its footer has {group.num_rows:,}.")

    def _column_at_fault(self, group: RowGroup, columns: Sequence[str]) -> str:
        """Return the first column that cannot be read by itself, for messages; "" if there is none."""
        for name in columns:
            try:
                open_parquet(group.path).read_row_group(group.number, columns=[name], use_threads=False)
            except DataError:  # not readable at all
                return ""
            except UNREADABLE:
                return f", column {name!r}"
        return ""

    def _read(self, column: pa.ChunkedArray, name: str, group: RowGroup, dictionaries: bool) -> pa.Array:
        """Return a column in one chunk and of the split's type; with `dictionaries`, encoded text stays encoded."""
        try:
            column = plain_column(column, keeps_dictionaries=dictionaries)
            kind = column.type
            is_encoded = pa.types.is_dictionary(kind) or (is_list(kind) and pa.types.is_dictionary(kind.value_type))
            if not is_encoded and kind != self.columns[name]:  # a narrower type than other files have
                column = column.cast(self.columns[name])
            return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        except pa.ArrowException as error:
            raise DataError(
                f"{group}, column {name!r}: its {column.type} cannot be read as {self.columns[name]}: {error}"
            ) from None

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[RowGroup, pa.Table]]:
        for group in self.row_groups:
            yield group, self.read(group, columns)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Return the whole split as a table in memory."""
        return pa.concat_tables(table for _, table in self.tables(columns)).combine_chunks()


def _decoded(file: pq.ParquetFile, group: RowGroup, columns: list[str], block_rows: int) -> Iterator[pa.Table]:
    if block_rows >= group.num_rows:
        yield file.read_row_group(group.number, columns=columns, use_threads=False)
        return
    for batch in file.iter_batches(block_rows, row_groups=[group.number], columns=columns, use_threads=False):
        yield pa.Table.from_batches([batch])
