"""A dataset folder: which files, how many rows, which columns; read by row group."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.data import DataConfig
from trec_twotower.config.feature_spec import HISTORY
from trec_twotower.config.loading import read_yaml
from trec_twotower.data.arrow_types import holds_null_alone, is_list, is_wider, plain_column, plain_type, widest
from trec_twotower.data.parquet_files import (
    UNREADABLE,
    encoded_texts,
    folder_of,
    footer_digest,
    open_parquet,
    parquet_below,
    parquet_files,
    refuse_other_endings,
    refuse_tables,
    size_of,
)
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.ops.hashing import is_id
from trec_twotower.storage.manifest import own_sha256

USER_ID, ITEM_ID, POSITIVES = "user_id", "item_id", "positives"
DESCRIPTION = "dataset.yaml"
SERVING = "serving"  # the part with each user's whole history and nothing to find
TRAIN, TRAIN_USERS = "train", "train_users"  # the folders of training rows: of either kind, of users beside events
PARTS_OF_ROWS = (TRAIN, TRAIN_USERS, "valid", "test")
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


class Dataset:
    """The folder that `prepare`, or anything else that writes Parquet, has made.

    `files` are, for some of its parts, the files that are meant, as Split takes them; so is `like`, for train/. Without
    `files` those of a part that dataset.yaml describes are the ones that it lists, but for a folder that `grows`.
    """

    def __init__(
        self,
        folder: Path | str,
        files: Mapping[str, Mapping[str, int]] | None = None,
        like: Mapping[str, pa.DataType] | None = None,
        *,
        grows: bool = False,
    ) -> None:
        self.files = files
        self._like = like
        self._grows = grows
        self._train = TRAIN
        self.folder = folder = folder_of(folder)
        if folder.is_file():
            raise DataError(f"{folder} is a file: a dataset is a folder with train/ and items/, made by `prepare`.")
        if not folder.is_dir():
            near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            where = "" if hasattr(folder, "fs") or folder.is_absolute() else f" in {Path.cwd()}"
            raise DataError(
                f"There is no dataset folder {folder}{where}{nearest(folder.name, near)}: make it with `prepare`."
            )
        for name in ("train", "items"):
            if not (folder / name).is_dir():
                raise DataError(f"{folder} is no dataset: it has no folder {name}/ (it needs train/ and items/).")

    @classmethod
    def of(cls, data: DataConfig) -> Dataset:
        """The one that a config names, with all its files."""
        return cls(data.dataset, grows=data.follow is not None).by(data.rows)

    def by(self, rows: str) -> Dataset:
        """The same, seen by event or by user: its training rows are those of train_users/ where that is so and there.

        Of a folder that grows, those of train/.
        """
        is_apart = rows == "user" and self.files is None and not self._grows and self.has(TRAIN_USERS)
        place = TRAIN_USERS if is_apart else TRAIN
        if place == self._train:
            return self
        other = copy(self)
        other._train = place
        other.__dict__.pop("train", None)  # cached
        return other

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
        if not self.has("users"):
            return None
        split = self.split("users")
        self._check_ids(split, USER_ID)
        return split

    def has(self, name: str) -> bool:
        return (self.folder / name).is_dir() and (self.files or {}).get(name) != {}

    def split(self, name: str) -> Split:
        if not self.has(name):
            parts = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
            raise DataError(f"{self.folder} has no part {name!r}{nearest(name, parts)}.")
        files = None if self.files is None else self.files.get(name)
        place = self._train if name == TRAIN else name
        described = {Path(path).name: facts for path, facts in self._described_files.items()
                     if Path(path).parent.name == place}  # fmt: skip
        if described and self.files is None and not self._grows:
            self._check_files(place, set(described))
        footers = {file: facts["footer"] for file, facts in described.items() if "footer" in facts}
        split = Split(self.folder / place, name, files, self._like if name == TRAIN else None, footers)
        if name not in (TRAIN, "items", "users") and any(map(holds_null_alone, split.columns.values())):
            ids = pa.list_(self.items.columns[ITEM_ID])
            split.adopt_types({POSITIVES: ids, HISTORY: ids, ITEM_ID: ids.value_type, **self.train.columns})
        return split

    def _check_files(self, name: str, described: set[str]) -> None:
        """Raises DataError where a part has other files than dataset.yaml lists of it."""
        found = {path.name for path in parquet_files(self.folder / name)}
        odd = [
            f"{'has no' if is_lacking else 'also has'} {_few(files)}, {'' if is_lacking else 'un'}listed there"
            for is_lacking, files in ((True, described - found), (False, found - described))
            if files
        ]
        if odd:
            raise DataError(
                f"{self.folder / name} is not what {self.folder / DESCRIPTION} says: it {' and '.join(odd)}. Make the "
                f"dataset again; or, where the files are as you want them, remove {DESCRIPTION} (of a folder that "
                "grows, set data.follow)."
            )

    @cached_property
    def description(self) -> dict[str, Any]:
        """dataset.yaml, or nothing where somebody else made the folder."""
        path = self.folder / DESCRIPTION
        described = read_yaml(path) or {} if path.is_file() else {}
        if not isinstance(described, dict):
            raise DataError(f"{path} does not describe a dataset: make it again, or remove it.")
        if "sha256" in described and described["sha256"] != own_sha256(described):
            raise DataError(f"{path} is damaged or was changed (its own sha256 differs): make it again, or remove it.")
        return described

    @cached_property
    def _described_files(self) -> dict[str, dict[str, Any]]:
        files = self.description.get("files") or {}
        if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
            raise DataError(f"{self.folder / DESCRIPTION} does not list its files: make it again, or remove it.")
        return files

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that change when the rows do: names and sizes of the files of train/, valid/ and test/.

        Where only some files are meant, of those alone, also of items/ and users/.
        """
        digest = hashlib.sha256()
        if self.files is not None:
            digest.update(json.dumps(self.files, sort_keys=True).encode())
            return digest.hexdigest()[:12]
        for part in PARTS_OF_ROWS:
            for path in self.paths(part):
                digest.update(f"{part}/{path.name} {size_of(path)}\n".encode())
        return digest.hexdigest()[:12]

    @cached_property
    def described_fingerprint(self) -> str | None:
        """Twelve hex digits of the digests that dataset.yaml has of those files; None where there are none."""
        facts = {name: each.get("sha256") for name, each in self._described_files.items()
                 if Path(name).parent.name in PARTS_OF_ROWS}  # fmt: skip
        if not facts or self.files is not None:
            return None
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def paths(self, part: str) -> list[Path]:
        """Return the Parquet files that lie in a part of the dataset; none where there is no such part."""
        folder = self.folder / part
        return parquet_files(folder) if folder.is_dir() else []

    @staticmethod
    def _check_ids(split: Split, column: str) -> None:
        if not split.has(column):
            raise DataError(
                f"{split.folder} has no column {column!r}{nearest(column, split.columns)}: every row must name its "
                f"{column.removesuffix('_id')}."
            )
        if not is_id(split.columns[column]):
            raise DataError(
                f"{split.folder}: column {column!r} is {split.columns[column]}, but ids are integers or text: cast it."
            )


def _few(names: set[str]) -> str:
    """Some names, or the first of them and how many others there are."""
    first, *others = sorted(names)
    return ", ".join([first, *others]) if len(others) < 3 else f"{first} and {len(others):,} other files"


def _decoded(file: pq.ParquetFile, group: RowGroup, columns: list[str], block_rows: int) -> Iterator[pa.Table]:
    if block_rows >= group.num_rows:
        yield file.read_row_group(group.number, columns=columns, use_threads=False)
        return
    for batch in file.iter_batches(block_rows, row_groups=[group.number], columns=columns, use_threads=False):
        yield pa.Table.from_batches([batch])
