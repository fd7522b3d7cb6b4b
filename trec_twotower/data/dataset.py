"""A dataset folder: which files, how many rows, which columns; read by row group."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from trec_twotower.config import DataConfig
from trec_twotower.data.hashing import is_id, is_text
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.yaml_files import read_yaml

USER_ID, ITEM_ID, POSITIVES = "user_id", "item_id", "positives"
DESCRIPTION = "dataset.yaml"
SERVING = "serving"  # the part with each user's whole history and nothing to find
TRAIN, TRAIN_USERS = "train", "train_users"  # the folders of training rows: of either kind, of users beside events
FOOTERS = 64  # kept of the files read last
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
            file = _open(path)
            self._agree(path, file.schema_arrow)
            self._texts |= _encoded_texts(file)
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
        found = sorted(self.folder.rglob("*.parquet"))
        below = [path for path in found if path.parent != self.folder]
        for path in below:
            name = str(path.relative_to(self.folder))
            if name[0] not in "._":  # as writers call what is under way
                raise DataError(
                    f"{self.folder} has {name} in a folder below: the files of a part lie side by side. Move them up, "
                    "or remove what is not meant; what a folder's name tells must be a column."
                )
        return [path for path in found if path.parent == self.folder]

    def _agree(self, path: Path, schema: pa.Schema) -> None:
        """The split's columns are those that all files have, of one type or narrower and wider ones, in any order."""
        found = {field.name: field.type for field in schema}
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
            if wide is not None and self._is_settled and _is_wider(wide, kind):
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
        """Raises DataError for a file that is gone or of another size than it was said to have."""
        if path not in self._bytes:
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

    def has(self, column: str) -> bool:
        """Whether all files have it; raises DataError where only some do, since whoever asks would use it."""
        if column in self._lacking:
            raise DataError(
                f"{self._lacking[column]} has no column {column!r}, which other files of {self.folder} have: write it "
                "into all files, or into none."
            )
        return column in self.columns

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
            file = _open(group.path, self._texts if dictionaries else (), self._footers.get(group.path))
            if len(self._footers) >= FOOTERS:
                self._footers.clear()
            self._footers[group.path] = file.metadata
            for block in _decoded(file, group, list(columns), block_rows):
                table = block.select(columns).combine_chunks()
                for place, name in enumerate(columns):
                    if table.schema.types[place] != self.columns[name]:
                        table = self._widened(table, place, name)
                found += len(table)
                yield table
        except UNREADABLE as error:
            raise DataError(f"{group}{self._column_at_fault(group, columns)}: cannot be read: {error}") from None
        if found != group.num_rows:  # no checksum covers the footer
            raise DataError(f"{group} is damaged: it holds {found:,} rows, its footer says {group.num_rows:,}.")

    def _column_at_fault(self, group: RowGroup, columns: Sequence[str]) -> str:
        """Names the first column that cannot be read by itself; nothing where that is not to be told."""
        for name in columns:
            try:
                _open(group.path).read_row_group(group.number, columns=[name], use_threads=False)
            except DataError:  # not even opened
                return ""
            except UNREADABLE:
                return f", column {name!r}"
        return ""

    def _widened(self, table: pa.Table, place: int, name: str) -> pa.Table:
        """A column of a file that has it narrower, as the widest file has it; dictionaries stay."""
        kind = table.schema.types[place]
        if pa.types.is_dictionary(kind) or (_is_list(kind) and pa.types.is_dictionary(kind.value_type)):
            return table
        return table.set_column(place, name, table[name].cast(self.columns[name]))

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
        if not folder.is_dir():
            near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise DataError(f"There is no dataset folder {folder}{nearest(folder.name, near)}: make it with `prepare`.")
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
        return Split(self.folder / place, name, files, self._like if name == TRAIN else None, footers)

    def _check_files(self, name: str, described: set[str]) -> None:
        """Raises DataError where a part has other files than dataset.yaml lists of it."""
        found = {path.name for path in (self.folder / name).glob("*.parquet")}
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
        if "sha256" in described and described["sha256"] != digest_of_description(described):
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
        """Twelve hex digits that change when the data do: names and sizes of all files, and dataset.yaml's digests.

        Where only some files are meant, of those alone.
        """
        digest = hashlib.sha256()
        if self.files is not None:
            digest.update(json.dumps(self.files, sort_keys=True).encode())
            return digest.hexdigest()[:12]
        for path in sorted(self.folder.rglob("*.parquet")):
            digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}\n".encode())
        for name, facts in sorted(self._described_files.items()):
            digest.update(f"{name} {facts.get('sha256')}\n".encode())
        return digest.hexdigest()[:12]

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


def widest(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds both without loss: the wider integer, the wider float, lists of such; else None."""
    if one == other or pa.types.is_null(other):  # a file whose column is null throughout has no type to tell
        return one
    if pa.types.is_null(one):
        return other
    if _is_list(one) and _is_list(other):
        inner = widest(one.value_type, other.value_type)
        return None if inner is None else pa.list_(inner)
    for is_kind in (pa.types.is_signed_integer, pa.types.is_floating):
        if is_kind(one) and is_kind(other):
            return one if one.bit_width > other.bit_width else other
    texts = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (one, other)]
    return pa.string() if all(is_text(kind) for kind in texts) else None


def _decoded(file: pq.ParquetFile, group: RowGroup, columns: list[str], block_rows: int) -> Iterator[pa.Table]:
    if block_rows >= group.num_rows:
        yield file.read_row_group(group.number, columns=columns, use_threads=False)
        return
    for batch in file.iter_batches(block_rows, row_groups=[group.number], columns=columns, use_threads=False):
        yield pa.Table.from_batches([batch])


def _is_wider(wide: pa.DataType, kind: pa.DataType) -> bool:
    """Whether numbers of the type `wide`, which holds `kind`, need not fit into that."""
    if _is_list(wide) and _is_list(kind):
        return _is_wider(wide.value_type, kind.value_type)
    return wide != kind and not pa.types.is_null(kind) and not is_text(wide)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _encoded_texts(file: pq.ParquetFile) -> set[str]:
    """The paths of columns (list elements among them) whose text the first row group holds by dictionary."""
    if not file.metadata.num_row_groups:
        return set()
    chunks = file.metadata.row_group(0)
    leaves = (file.schema.column(number) for number in range(len(file.schema)))
    return {
        leaf.path
        for number, leaf in enumerate(leaves)
        if leaf.logical_type.type == "STRING" and chunks.column(number).has_dictionary_page
    }


def digest_of_description(described: Mapping[str, Any]) -> str:
    """SHA-256 of what dataset.yaml says, but for this digest itself."""
    rest = {name: value for name, value in described.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def footer_digest(path: Path) -> str:
    """ "xxh3-" and the XXH3-64 of a Parquet file's footer; of no sense where the file is none."""
    with path.open("rb") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(num_bytes - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(num_bytes - 8 - length, 0))
        return f"xxh3-{xxhash.xxh3_64_hexdigest(file.read())}"


def rows_if_whole(path: Path) -> int | None:
    """How many rows a Parquet file has; None where its footer cannot be read, as while it is being written."""
    try:
        return _open(path).metadata.num_rows
    except DataError:
        return None


_LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "hdfs": "pyarrow"}


def folder_of(place: Path | str) -> Path:
    """A folder of this machine, or behind a URL that fsspec knows (s3://..., gs://..., memory://...).

    Raises ConfigError for a scheme that is unknown, or whose library is not installed.
    """
    if isinstance(place, str) and "://" in place:
        from upath import UPath

        scheme = place.partition("://")[0]
        try:
            there: Any = UPath(place)  # has the face of a Path
            _ = there.fs
        except ImportError as error:
            library = _LIBRARIES.get(scheme)
            mend = f"pip install {library}" if library else "install what that says"
            raise ConfigError(
                f"The dataset is {place}, but what reads {scheme}:// is not installed ({error}): {mend}."
            ) from None
        except ValueError:
            raise ConfigError(
                f"The dataset is {place}, but fsspec knows no {scheme}://{nearest(scheme, _LIBRARIES)}: name a folder, "
                "or a URL of such a scheme."
            ) from None
        return there
    return Path(place)


def _open(path: Path, dictionaries: Iterable[str] = (), footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """The file: of this machine memory-mapped, pages checked against their checksums where they have some."""
    is_here = not hasattr(path, "fs")
    try:
        file = pq.ParquetFile(
            path if is_here else path.open("rb"),
            metadata=footer,
            memory_map=is_here,
            page_checksum_verification=True,
            read_dictionary=list(dictionaries),
        )
        assert file.schema_arrow is not None  # decodes the names, which may be damaged as well
        return file
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
