"""The dataset folder, written whole or not at all.

DATASET/
  dataset.yaml              source, options, counts, columns, and rows, bytes and digests of each file
  train/part-00000.parquet  a row per example; valid/ and test/ a row per user to evaluate
  serving/                  where nothing is held out: a row per user with its whole history
  items/                    the catalogue, a row per item
  users/                    where there are static features of users
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.loading import parse_yaml, to_yaml
from trec_twotower.data.dataset import SERVING, digest_of_description
from trec_twotower.data.parquet_files import footer_digest
from trec_twotower.errors import ConfigError

FORMAT = 1
MANIFEST = "dataset.yaml"
SCRATCH = "scratch"
ROWS_PER_GROUP = 131_072
ROWS_PER_PART = 32 * ROWS_PER_GROUP
SPLITS = ("train", "train_users", "valid", "test", SERVING, "items", "users")

_in_use: set[Path] = set()  # temporary folders of this process


def list_column(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> pa.ListArray:
    """A column of lists: row r is `values[starts[r] : stops[r]]`; the ranges may overlap."""
    lengths = stops - starts
    offsets = np.append(0, np.cumsum(lengths))
    assert offsets[-1] < 2**31, "a piece this long needs cutting"
    position = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values[position]))


class DatasetWriter:
    """Writes into a temporary folder beside `out` and renames it there when `finish` is called.

    Leaving the `with` block by an exception removes the temporary folder; an earlier dataset at `out`
    stays as it was until a complete one takes its place. Memory holds one row group per split.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        rows_per_group: int = ROWS_PER_GROUP,
        rows_per_part: int = ROWS_PER_PART,
    ) -> None:
        self.out = Path(out).expanduser().resolve()
        self.rows_per_group = rows_per_group
        self.groups_per_part = max(1, rows_per_part // rows_per_group)
        self._overwrite = overwrite
        self._mark = f"{os.getpid()}@{socket.gethostname()}"
        self.temporary = self.out.with_name(f".{self.out.name}.tmp-{self._mark}")
        self._splits: dict[str, _Split] = {}

    def __enter__(self) -> Self:
        if self.temporary in _in_use:
            raise ConfigError(f"{self.out} is being written by another thread of this process: wait for it.")
        _sweep(self.out)
        self._refuse_if_taken()
        self.temporary.mkdir(parents=True)
        _in_use.add(self.temporary)
        return self

    def write(self, split: str, table: pa.Table) -> None:
        """Add rows to one of SPLITS; all tables of a split have one schema."""
        assert split in SPLITS, split
        if split not in self._splits:
            self._splits[split] = _Split(self.temporary / split, self.rows_per_group, self.groups_per_part)
        self._splits[split].write(table)

    def scratch_dir(self) -> Path:
        """A folder for what a source spills to disk; `finish`, or leaving the `with` block, removes it."""
        folder = self.temporary / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def finish(self, source: str, options: dict[str, Any], counts: dict[str, int], **more: Any) -> dict[str, Any]:
        """Close the files, write dataset.yaml, put the folder in place; return what dataset.yaml holds.

        `counts` is joined by the rows of each split; `more` are further top-level entries.
        """
        for split in self._splits.values():
            split.close()
        if (self.temporary / SCRATCH).exists():
            shutil.rmtree(self.temporary / SCRATCH)
        written = [name for name in SPLITS if name in self._splits and self._splits[name].files]
        rows = {f"{name}_rows": self._rows(name) for name in ("train", "valid", "test")}
        rows |= {f"{name}_rows": self._rows(name) for name in ("train_users", SERVING) if name in written}
        manifest = {
            "format": FORMAT,
            "source": source,
            "options": options,
            "counts": {**counts, **rows},
            **more,
            "columns": {name: self._splits[name].columns() for name in written},
            "files": {key: value for name in written for key, value in self._splits[name].describe().items()},
        }
        text = to_yaml(manifest)
        manifest["sha256"] = digest_of_description(parse_yaml(text, MANIFEST))
        with (self.temporary / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(f"sha256: {manifest['sha256']}\n{text}")  # first, where no cut takes it away alone
            file.flush()
            os.fsync(file.fileno())
        for folder in (*(self.temporary / name for name in written), self.temporary):
            _fsync(folder)
        self._put_in_place()
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            with contextlib.suppress(Exception):  # what went wrong is already on its way up
                split.abandon()
        shutil.rmtree(self.temporary, ignore_errors=True)
        _in_use.discard(self.temporary)

    def _rows(self, split: str) -> int:
        return self._splits[split].rows if split in self._splits else 0

    def _refuse_if_taken(self) -> None:
        out = self.out
        if not out.exists():
            there = next(parent for parent in out.parents if parent.exists())
            if not there.is_dir():
                raise ConfigError(f"{out} would be below {there}, which is a file: give another folder.")
            return
        if not out.is_dir():
            raise ConfigError(f"{out} is a file: a dataset is a folder, give another name.")
        if not (out / MANIFEST).is_file() and any(out.iterdir()):
            held = sorted(entry.name for entry in out.iterdir())
            shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
            raise ConfigError(
                f"{out} holds {len(held)} entries ({shown}) but no {MANIFEST}: it is not "
                "a dataset and is left alone. Give another folder."
            )
        if not self._overwrite:
            raise ConfigError(f"{out} exists already: give another folder, or add --overwrite.")

    def _put_in_place(self) -> None:
        self._refuse_if_taken()  # it may have come while we wrote
        if not self.out.exists():
            self.temporary.rename(self.out)
        else:
            old = self.out.with_name(f".{self.out.name}.old-{self._mark}")
            self.out.rename(old)
            try:
                self.temporary.rename(self.out)
            except BaseException:
                old.rename(self.out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        _fsync(self.out.parent)


class _Split:
    """The parts of one split; rows wait here until they fill a row group."""

    def __init__(self, folder: Path, rows_per_group: int, groups_per_part: int) -> None:
        self.folder = folder
        self.rows = 0
        self.files: list[tuple[Path, int]] = []
        self._rows_per_group = rows_per_group
        self._groups_per_part = groups_per_part
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._part: pq.ParquetWriter | None = None
        self._part_groups = 0
        self._schema: pa.Schema | None = None

    def write(self, table: pa.Table) -> None:
        self._schema = self._schema or table.schema
        assert table.schema.equals(self._schema), f"{self.folder.name}: {table.schema} after {self._schema}"
        self.rows += len(table)
        self._waiting.append(table)
        self._waiting_rows += len(table)
        if self._waiting_rows >= self._rows_per_group:
            waiting = pa.concat_tables(self._waiting)
            full = len(waiting) - len(waiting) % self._rows_per_group
            for start in range(0, full, self._rows_per_group):
                self._write_group(waiting.slice(start, self._rows_per_group))
            rest = waiting.slice(full)
            self._waiting, self._waiting_rows = [rest], len(rest)

    def close(self) -> None:
        if self._waiting_rows:
            self._write_group(pa.concat_tables(self._waiting))
        self._waiting, self._waiting_rows = [], 0
        self._close_part()

    def abandon(self) -> None:
        """Let go of an unfinished part."""
        if self._part is not None:
            part, self._part = self._part, None
            part.close()

    def columns(self) -> dict[str, str]:
        """The name and Arrow type of each column, as a reader of the files sees them."""
        return {field.name: str(field.type) for field in pq.read_schema(self.files[0][0])}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Rows, bytes, sha256 and the footer's digest by path within the dataset."""
        described = {}
        for path, rows in self.files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = f"{self.folder.name}/{path.name}"
            described[name] = {
                "rows": rows,
                "bytes": path.stat().st_size,
                "sha256": digest,
                "footer": footer_digest(path),
            }
        return described

    def _write_group(self, table: pa.Table) -> None:
        if self._part is None:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"part-{len(self.files):05d}.parquet"
            self._part = pq.ParquetWriter(
                path, self._schema, compression="zstd", use_dictionary=True, write_page_checksum=True
            )
            self._part_groups = 0
            self.files.append((path, 0))
        self._part.write_table(table.combine_chunks(), row_group_size=self._rows_per_group)
        self._part_groups += 1
        path, rows = self.files[-1]
        self.files[-1] = (path, rows + len(table))
        if self._part_groups == self._groups_per_part:
            self._close_part()

    def _close_part(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None
            _fsync(self.files[-1][0])


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(out: Path) -> None:
    """Clear what dead processes of this machine left beside `out`; put back a dataset caught mid-swap."""
    if not out.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(out.name)}\.(tmp|old)-(\d+)@{re.escape(socket.gethostname())}")
    for entry in sorted(out.parent.iterdir()):
        match = name.fullmatch(entry.name)
        if match is None or entry in _in_use or _is_alive(int(match[2])):
            continue
        if match[1] == "old" and not out.exists():
            entry.rename(out)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a namesake's leftovers: our own are in `_in_use`
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
