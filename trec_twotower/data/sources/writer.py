"""Writer of dataset folders: a dataset is published complete or not at all.

DATASET/
  dataset.yaml              source, options, counts, columns, and rows, bytes and digests of each file
  train/part-00000.parquet  one row per example; valid/ and test/ have one row per user
  serving/                  if nothing is held out: one row per user with the whole history
  items/                    the catalogue, one row per item
  users/                    features of users, if the source has any
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.loading import parse_yaml, to_yaml
from trec_twotower.data.dataset import SERVING
from trec_twotower.data.parquet_files import footer_digest
from trec_twotower.errors import ConfigError
from trec_twotower.storage.artifacts import NewFolder
from trec_twotower.storage.manifest import digest_of, own_sha256

FORMAT = 1
MANIFEST = "dataset.yaml"
SCRATCH = "scratch"
ROWS_PER_GROUP = 131_072
ROWS_PER_PART = 32 * ROWS_PER_GROUP
SPLITS = ("train", "train_users", "valid", "test", SERVING, "items", "users")

_in_use: set[Path] = set()  # datasets that this process is writing


def list_column(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> pa.ListArray:
    """Return a column of lists: row r is `values[starts[r] : stops[r]]`; the ranges may overlap."""
    lengths = stops - starts
    offsets = np.append(0, np.cumsum(lengths))
    assert offsets[-1] < 2**31, "too many values for int32 offsets"
    position = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values[position]))


class DatasetWriter:
    """Writer of a dataset into a temporary folder next to `out`; `finish` renames it to `out`.

    An exception in the `with` block removes the temporary folder. An earlier dataset at `out` is unchanged until the
    complete one replaces it. Memory holds one row group per split.
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
        self._new = NewFolder(self.out)
        self.temporary = self.out  # the temporary folder, inside the `with` block
        self._splits: dict[str, _Split] = {}

    def __enter__(self) -> Self:
        if self.out in _in_use:
            raise ConfigError(f"{self.out} is being written by another thread of this process: wait for it.")
        self._refuse_file()
        self.temporary = self._new.begin()
        _in_use.add(self.out)
        try:
            self._refuse_existing()
        except BaseException:
            self._end()
            raise
        return self

    def write(self, split: str, table: pa.Table) -> None:
        """Append rows to one of SPLITS; all tables of a split have the same schema."""
        assert split in SPLITS, split
        if split not in self._splits:
            self._splits[split] = _Split(self.temporary / split, self.rows_per_group, self.groups_per_part)
        self._splits[split].write(table)

    def scratch_dir(self) -> Path:
        """Return a folder for temporary files of a source; `finish` and the end of the `with` block remove it."""
        folder = self.temporary / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def finish(self, source: str, options: dict[str, Any], counts: dict[str, int], **more: Any) -> dict[str, Any]:
        """Close the files, write dataset.yaml, publish the folder, and return the content of dataset.yaml.

        The rows of each split are added to `counts`. `more` are further top-level entries.
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
        manifest["sha256"] = own_sha256(parse_yaml(text, MANIFEST))
        # The digest is the first line, so that a truncated file still has it.
        (self.temporary / MANIFEST).write_text(f"sha256: {manifest['sha256']}\n{text}", encoding="utf-8")
        self._refuse_existing()  # another process may have created it in the meantime
        self._new.publish()
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            with contextlib.suppress(Exception):  # the first error is already being raised
                split.abandon()
        self._end()

    def _end(self) -> None:
        """Remove the temporary folder if it was not published, and free the lock."""
        self._new.end()
        _in_use.discard(self.out)

    def _rows(self, split: str) -> int:
        return self._splits[split].rows if split in self._splits else 0

    def _refuse_file(self) -> None:
        """Raise ConfigError if the dataset's path, or one of its parents, is a file."""
        out = self.out
        found = next(path for path in (out, *out.parents) if path.exists())
        if found.is_dir():
            return
        if found == out:
            raise ConfigError(f"{out} is a file: a dataset is a folder, give another name.")
        raise ConfigError(f"{out} would be below {found}, which is a file: give another folder.")

    def _refuse_existing(self) -> None:
        """Raise ConfigError if the path has other files, or a dataset that is not to be overwritten."""
        out = self.out
        if not out.exists():
            return
        self._refuse_file()
        if not (out / MANIFEST).is_file() and any(out.iterdir()):
            held = sorted(entry.name for entry in out.iterdir())
            shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
            raise ConfigError(
                f"{out} holds {len(held)} entries ({shown}) but no {MANIFEST}: it is not "
                "a dataset and is left alone. Give another folder."
            )
        if not self._overwrite:
            raise ConfigError(f"{out} exists already: give another folder, or add --overwrite.")


class _Split:
    """The files of one split; rows are buffered until they fill a row group."""

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
        """Close an unfinished file."""
        if self._part is not None:
            part, self._part = self._part, None
            part.close()

    def columns(self) -> dict[str, str]:
        """Return the Arrow type of each column by name, as a reader of the files sees them."""
        return {field.name: str(field.type) for field in pq.read_schema(self.files[0][0])}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return rows, bytes, SHA-256 and the footer's digest of each file, by its path in the dataset."""
        described = {}
        for path, rows in self.files:
            name = f"{self.folder.name}/{path.name}"
            described[name] = {"rows": rows, **digest_of(path), "footer": footer_digest(path)}
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
