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


FOOTERS = 64  # kept of the files read last


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
    """The Parquet files of one folder as one table; raises DataError for files that are not what they should be.

    `files` are names and bytes of those that are meant, in order; by default all there are. `like` are the columns of
    files read before these, which may be no wider. `footers` has, by name, what `footer_digest` gave when files were
    written: pages have checksums, but of a footer with one flipped bit pyarrow may read other values, or abort.
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
        self._lacking: dict[str, Path] = {}  # columns that some files have and others not, with one that has not
        self._bytes = {} if files is None else {folder / name: size for name, size in files.items()}
        self._opened: dict[Path, tuple[int, int]] = {}  # of local files: bytes, and when they were last changed
        self._footers: dict[Path, pq.FileMetaData] = {}  # of many row groups, each would be a long read of its own
        self._texts: set[str] = set()  # columns of text that Parquet holds as dictionaries
        paths = self._side_by_side() if files is None else list(self._bytes)
        if not paths:
            raise DataError(f"{folder} holds no *.parquet files: run `trec-twotower prepare`, or put them there.")
        first_row = 0
        for path in paths:
            self._check_bytes(path)
            if footers is not None and path.name in footers and footer_digest(path) != footers[path.name]:
                raise DataError(
                    f"{path} is not what {folder.parent / DESCRIPTION} says (its footer differs): it is damaged, or "
                    f"was written anew; make the dataset again, or remove {DESCRIPTION}."
                )
            file = open_parquet(path)
            self._agree(path, file.schema_arrow)
            self._texts |= encoded_texts(file)
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

    def _side_by_side(self) -> list[Path]:
        """The part's files; raises DataError where there are others in folders below, as of Hive's partitions."""
        refuse_tables(self.folder)
        refuse_other_endings(self.folder)
        for path in parquet_below(self.folder):
            raise DataError(
                f"{self.folder} has {path.relative_to(self.folder)} in a folder below: the files of a part lie side by "
                "side. Move them up, or remove what is not meant; what a folder's name tells must be a column."
            )
        return parquet_files(self.folder)

    def _agree(self, path: Path, schema: pa.Schema) -> None:
        """The split's columns are those that all files have, of one type or narrower and wider ones, in any order."""
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
        """Raises DataError for a file that is gone, of another size than it was said to have, or not the same any more.

        The last is asked of local files.
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
                f"{path} {now}, but had {self._bytes[path]:,} when this run took it: bring that file back, or train "
                "into another run_dir."
            )
        self._check_unchanged(path)

    def _check_unchanged(self, path: Path) -> None:
        """Raise DataError for a local file that was replaced or rewritten since this process opened it first.

        Its rows would be read by the old file's footer, in the old file's order.
        """
        if not isinstance(path, PosixPath) or not path.is_file():
            return
        found = path.stat()
        if self._opened.setdefault(path, (found.st_size, found.st_mtime_ns)) != (found.st_size, found.st_mtime_ns):
            raise DataError(
                f"{path} was replaced or changed after this command had opened it: a dataset must stay as it is while "
                "it is read. Run the command again; a run that has begun needs the old file back, or another run_dir."
            )

    def has(self, column: str) -> bool:
        """Whether all files have it; raises DataError where only some do, since whoever asks would use it."""
        if column in self._lacking:
            raise DataError(
                f"{self._lacking[column]} has no column {column!r}, which other files of {self.folder} have: write it "
                "into all files, or into none."
            )
        return column in self.columns

    def adopt_types(self, types: Mapping[str, pa.DataType]) -> None:
        """Read columns that hold nothing but null, or lists of nothing, with these types of other parts."""
        for name, kind in self.columns.items():
            if name in types and holds_null_alone(kind):
                self.columns[name] = widest(kind, types[name]) or kind

    def require(self, column: str, why: str) -> pa.DataType:
        """The column's type; raises ConfigError when the split has no such column."""
        if not self.has(column):
            raise ConfigError(
                f"{self.folder} has no column {column!r}, which {why}{nearest(column, self.columns)}: "
                "correct the config, or write the column."
            )
        return self.columns[column]

    def read(self, group: RowGroup, columns: Sequence[str], *, dictionaries: bool = False) -> pa.Table:
        """One row group, its columns each in one chunk; with `dictionaries`, text stays as Parquet encoded it."""
        [table] = self.blocks(group, columns, group.num_rows, dictionaries=dictionaries)
        return table

    def blocks(
        self, group: RowGroup, columns: Sequence[str], block_rows: int, *, dictionaries: bool = False
    ) -> Iterator[pa.Table]:
        """`read`, so many rows at a time."""
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
            raise DataError(f"{group} is damaged: it holds {found:,} rows, its footer says {group.num_rows:,}.")

    def _column_at_fault(self, group: RowGroup, columns: Sequence[str]) -> str:
        """Names the first column that cannot be read by itself; nothing where that is not to be told."""
        for name in columns:
            try:
                open_parquet(group.path).read_row_group(group.number, columns=[name], use_threads=False)
            except DataError:  # not even opened
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
        """The whole split, in memory."""
        return pa.concat_tables(table for _, table in self.tables(columns)).combine_chunks()


def _decoded(file: pq.ParquetFile, group: RowGroup, columns: list[str], block_rows: int) -> Iterator[pa.Table]:
    if block_rows >= group.num_rows:
        yield file.read_row_group(group.number, columns=columns, use_threads=False)
        return
    for batch in file.iter_batches(block_rows, row_groups=[group.number], columns=columns, use_threads=False):
        yield pa.Table.from_batches([batch])
