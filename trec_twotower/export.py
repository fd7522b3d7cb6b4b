"""Vectors of the whole catalogue and of the users, as Parquet, each rank writing its slice."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.checkpoint import Checkpoints, model_version
from trec_twotower.config import binding
from trec_twotower.data.dataset import ITEM_ID, USER_ID
from trec_twotower.data.features import Sources
from trec_twotower.data.held_out import HeldOut
from trec_twotower.data.words import python_values
from trec_twotower.distributed import Ranks
from trec_twotower.encode import encode, encode_share
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.files import MANIFEST, naming_a_full_disk, open_sealed, publish_folder, seal
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.run import Run
from trec_twotower.train import build_model, towers

VECTOR = "vector"
VECTORS = "vectors"  # of users with several


@dataclass(frozen=True)
class LoadedModel:
    """A run's towers with the weights of one checkpoint."""

    run: Run
    sources: Sources
    model: TwoTower
    version: str
    step: int


def load_model(run: Run, ranks: Ranks, which: str = "best") -> LoadedModel:
    """The towers of a run's checkpoint ("best", "newest" or a step), spread over these ranks."""
    checkpoints = Checkpoints(run.folder / "checkpoints", ranks, settings=binding(run.config))
    path = checkpoints.choose(which)
    sources = run.sources(ranks)
    sharded = build_model(run.config, ranks)
    manifest = checkpoints.load(path, sharded)
    sharded.eval()
    return LoadedModel(run, sources, towers(sharded), model_version(path), manifest["step"])


def export(loaded: LoadedModel, ranks: Ranks) -> Path:
    """Write RUN/export: items-*.parquet in catalogue order, users-*.parquet, manifest.json. Returns the folder.

    A vector is a fixed-size list of float32 (`vector`), several of a user a fixed-size list of those (`vectors`).
    The users are those of the dataset's test/ (else valid/), as they are known there. A vector that is not finite
    stops the export with a DataError; an earlier export stays until the new one is complete.
    """
    run, sources = loaded.run, loaded.sources
    folder = run.folder / "export"
    temporary = run.folder / ".export.tmp"

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    ranks.once(begin)
    try:
        with naming_a_full_disk(folder, temporary):
            num_users, split = _write_vectors(loaded, temporary, ranks)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise

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
        }
        seal(temporary, facts)
        publish_folder(temporary, folder)

    ranks.once(finish)
    return folder


def _write_vectors(loaded: LoadedModel, folder: Path, ranks: Ranks) -> tuple[int, str | None]:
    """Write this rank's items and users; returns how many users all ranks wrote, and from which part of the dataset."""
    sources = loaded.sources
    item_vectors = encode_share(loaded.model, "item", sources.catalogue.columns, ranks).cpu().numpy()
    mine = ranks.share(len(sources.catalogue))
    item_ids = sources.catalogue.ids.slice(mine.start, mine.stop - mine.start)
    problem = _write(folder, "items", ITEM_ID, item_ids, item_vectors, ranks)
    num_users = 0
    split = next((name for name in ("test", "valid") if sources.dataset.has(name)), None)
    if split is not None:
        users = HeldOut.read(sources, split)
        num_users = len(users)
        part = users.part(ranks.share(num_users))
        user_vectors = encode(loaded.model, "user", part.user, ranks).cpu().numpy()
        problem = problem or _write(folder, "users", USER_ID, part.user_ids, user_vectors, ranks)
    if sum(ranks.sizes(int(problem is not None))):
        raise DataError(problem or "Another rank found vectors that are not finite; its message says which.")
    return num_users, split


def _write(folder: Path, what: str, id_column: str, ids: pa.Array, vectors: np.ndarray, ranks: Ranks) -> str | None:
    """Write this rank's file; returns what is wrong with the vectors instead, if anything is."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim))))
    if bad.size:
        first = python_values(ids.take(pa.array(bad[:5])))
        return (
            f"{bad.size:,} {what} have vectors with NaN or infinity, such as {id_column} {first}: nothing was exported."
        )
    path = folder / f"{what}-{ranks.rank:05d}-of-{ranks.num_ranks:05d}.parquet"
    table = pa.table({id_column: ids, **vector_column(vectors)})
    pq.write_table(
        table, path, row_group_size=65_536, write_page_checksum=True, compression="zstd", use_dictionary=False
    )
    return None


def vector_column(vectors: np.ndarray) -> dict[str, pa.Array]:
    """The column of (rows, D) vectors, or of (rows, M, D), under its name."""
    column = pa.array(vectors.reshape(-1))
    for size in reversed(vectors.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return {VECTOR if vectors.ndim == 2 else VECTORS: column}


@dataclass(frozen=True)
class Exported:
    """An export, read back."""

    manifest: dict[str, Any]
    item_ids: pa.Array
    item_ID: np.ndarray
    user_ids: pa.Array
    user_QD: np.ndarray  # (Q, M, D) where users have several vectors


class VectorFiles:
    """The vectors of an export's items or users, in their order, a piece at a time; a user's several one by one."""

    def __init__(self, folder: Path, what: str) -> None:
        self._paths = sorted(folder.glob(f"{what}-*.parquet"))
        self._column, (*several, self._dim) = _shape(self._paths)
        self._num_rows = sum(pq.read_metadata(path).num_rows for path in self._paths) * math.prod(several)

    @property
    def dim(self) -> int:
        return self._dim

    def __len__(self) -> int:
        return self._num_rows

    def pieces(self) -> Iterator[np.ndarray]:
        """float32 blocks of up to 2^16 rows."""
        for path in self._paths:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(1 << 16, columns=[self._column]):
                    yield _numbers(batch.column(0)).reshape(-1, self._dim)

    def ids(self) -> pa.Array:
        """Their outside ids."""
        if not self._paths:
            return pa.array([], pa.int64())
        tables = (pq.read_table(path, columns=[pq.read_schema(path).names[0]]) for path in self._paths)
        return pa.concat_tables(tables).combine_chunks().column(0).chunk(0)


def _shape(paths: Sequence[Path]) -> tuple[str, list[int]]:
    """The column of the vectors, and their shape: D numbers, or M times D; 0 where there is no file."""
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
    """An export's manifest, items and users, verified; raises ConfigError where there is none, DataError if damaged."""
    mend = f"export again: trec-twotower export {folder.parent}"
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} holds no export: {mend}")
    return open_sealed(folder, mend), VectorFiles(folder, "items"), VectorFiles(folder, "users")


def read_export(folder: Path) -> Exported:
    """All vectors and ids of an export, in memory; raises as `open_export`."""
    manifest, _, _ = open_export(folder)
    item_ids, items = _read(folder, "items", ITEM_ID, manifest["dim"])
    user_ids, users = _read(folder, "users", USER_ID, manifest["dim"])
    return Exported(manifest, item_ids, items, user_ids, users)


def _read(folder: Path, what: str, id_column: str, dim: int) -> tuple[pa.Array, np.ndarray]:
    paths = sorted(folder.glob(f"{what}-*.parquet"))
    if not paths:
        return pa.array([], pa.int64()), np.empty((0, dim), np.float32)
    table = pa.concat_tables(pq.read_table(path, page_checksum_verification=True) for path in paths).combine_chunks()
    name, shape = _shape(paths)
    vectors = _numbers(table[name].chunk(0)) if table.num_rows else np.empty(0, np.float32)
    return table[id_column].chunk(0), vectors.reshape(-1, *shape)
