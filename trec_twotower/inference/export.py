"""Vectors of the whole catalogue and of the users, as Parquet, each rank writing its slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.base import Side
from trec_twotower.data.dataset import ITEM_ID, SERVING, USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.held_out import HeldOut
from trec_twotower.data.split import Split
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.inference.model_loader import LoadedModel
from trec_twotower.model.encode import encode
from trec_twotower.storage.arrow_values import python_value, python_values
from trec_twotower.storage.artifacts import NewFolder, SealedFolder
from trec_twotower.storage.atomic import naming_a_full_disk
from trec_twotower.storage.manifest import seal

VECTOR = "vector"
VECTORS = "vectors"  # of users with several
GROUP_ROWS = 1 << 16  # of a row group: what is encoded and written together
PIECE = 1 << 16  # vectors that are handed on together when an export is read back
READ_ROWS = 1 << 11  # rows that are decoded together for that: what Arrow makes of them is several times as large


def export(loaded: LoadedModel, ranks: Ranks, *, columns: Sequence[str] = (), users: str | None = None) -> Path:
    """Write RUN/export: items-*.parquet in catalogue order, users-*.parquet, manifest.json. Returns the folder.

    A vector is a fixed-size list of float32 (`vector`), several of a user a fixed-size list of those (`vectors`).
    `columns` of items/ are written next to the items' vectors. The users are those of the dataset's part `users`
    (test/, else valid/, else
    serving/), as they are known there. Encoded and written a row group at a time. A vector that is not
    finite stops the export with a DataError; an earlier export stays until the new one is complete. Raises ConfigError
    where another process exports this run.
    """
    run, sources = loaded.run, loaded.sources
    split = _part_with_users(sources, users)
    columns = _known_columns(sources, columns)
    new = NewFolder(run.folder / "export")
    try:
        temporary = ranks.once(new.begin)
        with naming_a_full_disk(new.path, temporary):
            num_users = _write_vectors(loaded, temporary, ranks, columns, split)

        def finish() -> None:
            facts = {
                "model_version": loaded.version,
                "step": loaded.step,
                "dim": run.config.model.vector_dim,
                "vectors_per_user": loaded.model.vectors_per_user,
                "similarity": run.config.model.similarity,
                "items": len(sources.catalogue),
                "users": num_users,
                "users_from": split,
                "columns": columns,
            }
            seal(temporary, facts)
            new.publish()

        ranks.once(finish)
    finally:
        new.end()  # on the first rank, which alone has begun
    return new.path


def _part_with_users(sources: FeatureDataset, users: str | None) -> str | None:
    """Return the part of the dataset whose users are exported; None if there is none."""
    known = [name for name in ("test", "valid", SERVING) if sources.dataset.has(name)]
    if users is None:
        return known[0] if known else None
    if users not in known:
        raise ConfigError(
            f"--users is {users!r}, but {sources.dataset.folder} has users in {', '.join(known) or 'no part'}: "
            "name one of them, or encode other users by an encoder (export --encoder)."
        )
    return users


def _known_columns(sources: FeatureDataset, columns: Sequence[str]) -> list[str]:
    split = sources.catalogue.split
    for name in columns:
        if name not in split.columns or name in (ITEM_ID, VECTOR):
            if name in (ITEM_ID, VECTOR):
                raise ConfigError(f"--columns names {name!r}, which every export of items has: leave it out.")
            raise ConfigError(
                f"--columns names {name!r}, which is not in {split.folder}{nearest(name, split.columns)}."
            )
    return list(dict.fromkeys(columns))


def _write_vectors(loaded: LoadedModel, folder: Path, ranks: Ranks, columns: Sequence[str], split: str | None) -> int:
    """Write this rank's items and users; returns how many users all ranks wrote."""
    sources = loaded.sources
    catalogue = sources.catalogue

    def encoded(side: Side, columns: Columns) -> Callable[[int, int], np.ndarray]:
        return lambda start, stop: encode(loaded.model, side, columns.slice(start, stop), ranks).cpu().numpy()

    def of_items(start: int, stop: int) -> list[pa.Array]:
        about = _about(catalogue.split, columns, start, stop)
        return [catalogue.ids.slice(start, stop - start), *(about[name] for name in columns)]

    kinds = {ITEM_ID: catalogue.ids.type, **{name: catalogue.split.columns[name] for name in columns}}
    problem = _write(folder, "items", kinds, len(catalogue), of_items, encoded("item", catalogue.columns), ranks)
    num_users = 0
    if split is not None:
        users = HeldOut.read(sources, split)
        num_users = len(users)
        wrong = _write(
            folder, "users", {USER_ID: users.user_ids.type}, num_users,
            lambda start, stop: [users.user_ids.slice(start, stop - start)], encoded("user", users.user), ranks,
        )  # fmt: skip
        problem = problem or wrong
    if sum(ranks.sizes(int(problem is not None))):
        raise DataError(problem or "Another rank found vectors that are not finite; see its message.")
    return num_users


def _about(split: Split, columns: Sequence[str], start: int, stop: int) -> pa.Table:
    """Return columns of some rows of items/."""
    tables = [pa.table({name: pa.array([], split.columns[name]) for name in columns})]
    for group in split.row_groups if columns else ():
        first, last = max(start, group.first_row), min(stop, group.first_row + group.num_rows)
        if first < last:
            table = split.read(group, list(columns)).select(list(columns))
            tables.append(table.slice(first - group.first_row, last - first).cast(tables[0].schema))
    return pa.concat_tables(tables).unify_dictionaries()


def _write(
    folder: Path,
    what: str,
    kinds: Mapping[str, pa.DataType],
    num_rows: int,
    other_columns: Callable[[int, int], list[pa.Array]],
    vectors_of: Callable[[int, int], np.ndarray],
    ranks: Ranks,
) -> str | None:
    """Encode and write this rank's share of the rows; returns what is wrong with the vectors, if anything is.

    `kinds` are the types of the columns before the vectors, the ids first; `other_columns` returns them for a range
    of rows, as `vectors_of` returns the vectors, for which all ranks call together.
    """
    mine = ranks.share(num_rows)
    path = folder / f"{what}-{ranks.rank:05d}-of-{ranks.num_ranks:05d}.parquet"
    num_bad, writer = 0, None
    bad_ids: list[Any] = []
    try:
        # All ranks encode together, so that one with a row less goes round as often as the others
        for begin in range(0, max(*ranks.sizes(mine.stop - mine.start), 1), GROUP_ROWS):
            start, stop = (min(mine.start + at, mine.stop) for at in (begin, begin + GROUP_ROWS))
            vectors = vectors_of(start, stop)
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim))))
            cells = other_columns(start, stop)
            num_bad += len(bad)
            bad_ids += python_values(cells[0].take(pa.array(bad[: 5 - len(bad_ids)])))
            made = vector_column(vectors)
            schema = pa.schema([*kinds.items(), *((name, column.type) for name, column in made.items())])
            if writer is None:
                writer = pq.ParquetWriter(
                    path, schema, write_page_checksum=True, compression="zstd", use_dictionary=False
                )
            if len(vectors):
                writer.write_table(pa.table([*cells, *made.values()], schema=schema), row_group_size=GROUP_ROWS)
    finally:
        if writer is not None:
            writer.close()
    if num_bad:
        return (
            f"{num_bad:,} {what} have vectors with NaN or infinity, such as {next(iter(kinds))} {bad_ids}: nothing was "
            "exported."
        )
    return None


def vector_column(vectors: np.ndarray) -> dict[str, pa.Array]:
    """Return the column of (rows, D) or (rows, M, D) vectors, under its name."""
    column = pa.array(vectors.reshape(-1))
    for size in reversed(vectors.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return {VECTOR if vectors.ndim == 2 else VECTORS: column}


@dataclass(frozen=True)
class Exported:
    """An export in memory."""

    manifest: dict[str, Any]
    item_ids: pa.Array
    item_ID: np.ndarray
    user_ids: pa.Array
    user_QD: np.ndarray  # (Q, M, D) where users have several vectors


class VectorFiles:
    """The vectors of an export's items or users in file order; several vectors of a user follow each other."""

    def __init__(self, folder: SealedFolder | Path, what: str) -> None:
        self._folder = folder  # keeps the files open
        if isinstance(folder, SealedFolder):
            self._paths = [folder.path(name) for name in folder.names if name.startswith(f"{what}-")]
        else:
            self._paths = sorted(folder.glob(f"{what}-*.parquet"))
        self._column, (*several, self._dim) = _shape(self._paths)
        self._per_row = several[0] if several else None  # vectors of a row of several
        self._num_vectors = sum(pq.read_metadata(path).num_rows for path in self._paths) * (self._per_row or 1)

    @property
    def dim(self) -> int:
        return self._dim

    def __len__(self) -> int:
        return self._num_vectors

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield float32 blocks (up to 2^16, D)."""
        for path in self._paths:
            # Arrow would else read a column of the whole file ahead, and a row group's in one piece
            read = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
            with pq.ParquetFile(path, **read) as file:
                left = file.metadata.num_rows * (self._per_row or 1)
                piece_CD, filled = np.empty((min(left, PIECE), self._dim), np.float32), 0
                for batch in file.iter_batches(READ_ROWS, columns=[self._column]):
                    part_CD = _numbers(batch.column(0)).reshape(-1, self._dim)
                    while len(part_CD):
                        count = min(len(part_CD), len(piece_CD) - filled)
                        piece_CD[filled : filled + count] = part_CD[:count]
                        part_CD, filled, left = part_CD[count:], filled + count, left - count
                        if filled == len(piece_CD):
                            yield piece_CD
                            del piece_CD  # before the next is made
                            piece_CD, filled = np.empty((min(left, PIECE), self._dim), np.float32), 0
                    del batch, part_CD

    def array(self, dim: int) -> np.ndarray:
        """Return all vectors, float32 (rows, dim), or (rows, M, dim) for users with several vectors."""
        vectors, filled = np.empty((len(self), dim), np.float32), 0
        for piece_CD in self.pieces():
            vectors[filled : filled + len(piece_CD)] = piece_CD
            filled += len(piece_CD)
        return vectors if self._per_row is None else vectors.reshape(-1, self._per_row, dim)

    def ids(self) -> pa.Array:
        """Return the ids of the rows."""
        if not self._paths:
            return pa.array([], pa.int64())
        tables = (pq.read_table(path, columns=[pq.read_schema(path).names[0]]) for path in self._paths)
        return pa.concat_tables(tables).combine_chunks().column(0).chunk(0)

    def first_id(self) -> Any:
        """Return the id of the first row, or None if there is no row."""
        for path in self._paths:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1, columns=file.schema_arrow.names[:1]):
                    return python_value(batch.column(0), 0)
        return None


def _shape(paths: Sequence[Path]) -> tuple[str, list[int]]:
    """Return the vector column and its shape, [D] or [M, D]; [0] where there is no file."""
    if not paths:
        return VECTOR, [0]
    schema = pq.read_schema(paths[0])
    name = VECTOR if VECTOR in schema.names else VECTORS
    kind, sizes = schema.field(name).type, []
    while pa.types.is_fixed_size_list(kind):
        sizes.append(kind.list_size)
        kind = kind.value_type
    return name, sizes


def _numbers(column: pa.Array) -> np.ndarray:
    while pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column.to_numpy()


def open_export(folder: Path) -> tuple[dict[str, Any], VectorFiles, VectorFiles]:
    """Return an export's manifest, items and users, verified; they stay readable while another export replaces it.

    Raises ConfigError where there is none, DataError for a damaged one.
    """
    mend = f"export again: trec-twotower export {folder.parent}"
    try:
        sealed = SealedFolder.open(folder, mend)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no export: {mend}") from None
    return sealed.manifest, VectorFiles(sealed, "items"), VectorFiles(sealed, "users")


def read_export(folder: Path) -> Exported:
    """Return all vectors and ids of an export in memory; raises as `open_export`."""
    manifest, items, users = open_export(folder)
    dim = manifest["dim"]
    return Exported(manifest, items.ids(), items.array(dim), users.ids(), users.array(dim))
