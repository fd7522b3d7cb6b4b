"""The two towers in a folder: Arrow rows to vectors on one device, without a process group, a dataset or a run.

ENCODER/
  manifest.json    model_version, step, dim, similarity, SHA-256 of every file
  config.yaml      the run's config
  learned.json     what the features learned of the training data
  weights.safetensors  tables and towers
  steps.npz        only where a sequence's steps have attributes: those of the catalogue, by the items' keys
  user.pt2         each tower as a torch.export program, with its tables; see `Program`
  item.pt2
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trec_twotower.config.base import Side, as_values, validate
from trec_twotower.config.loading import read_yaml, to_yaml
from trec_twotower.config.model import TableSpec
from trec_twotower.config.run_config import RunConfig
from trec_twotower.config.schema import Schema
from trec_twotower.data.arrow_types import plain_table
from trec_twotower.data.dataset import ITEM_ID, USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.transform import check_kind, transform
from trec_twotower.distributed.ranks import Ranks, check_process, quiet_libraries
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.inference.export import vector_column
from trec_twotower.inference.exported_program import ProgramError, export_program, program_inputs
from trec_twotower.inference.model_loader import load_model
from trec_twotower.model.encode import encode
from trec_twotower.model.two_tower import SIDES, TwoTower
from trec_twotower.ops.key_table import KeyTable
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.artifacts import SealedFolder, new_folder
from trec_twotower.storage.atomic import read_json, write_file, write_json
from trec_twotower.storage.manifest import MANIFEST, seal
from trec_twotower.training.checkpoints.tensor_files import read_tensors, write_tensors
from trec_twotower.training.model_builder import build_whole_model
from trec_twotower.training.run_dir import Run

MEND = "write it again: trec-twotower export RUN --encoder"
CONFIG, LEARNED, WEIGHTS, STEPS = "config.yaml", "learned.json", "weights.safetensors", "steps.npz"
FACTS = {"model_version": str, "step": int, "dim": int, "similarity": str, "programs": dict}


@dataclass(frozen=True)
class Parts:
    """All that an encoder is made of, as plain values."""

    facts: dict[str, Any]
    config: dict[str, Any]
    statistics: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]
    steps: dict[str, np.ndarray]


class Encoder:
    """A run's towers on one device. pickle carries it whole, for Spark, Ray or a process pool.

    Rows are Arrow tables or batches with the columns that the features read, as the dataset has them; features that
    stand in users/ are columns of the rows here. Calls from several threads follow each other.
    """

    def __init__(self, parts: Parts, device: str = "cpu") -> None:
        quiet_libraries()
        self.parts = parts
        self.device = device
        self.config = validate(RunConfig, parts.config, "the encoder's config")
        self.schema = self.config.feature_schema
        self.statistics = {name: Statistics(**values) for name, values in parts.statistics.items()}
        self.model = _loaded_model(self.config, parts.weights, device)
        self._items, self._find = _catalogue_of_steps(self.schema, parts.steps)
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.parts, self.device)

    @property
    def model_version(self) -> str:
        """Names the weights, as in the export and the index."""
        return self.parts.facts["model_version"]

    @property
    def dim(self) -> int:
        return self.config.model.vector_dim

    @classmethod
    def of(cls, run: Run, sources: FeatureDataset, which: str = "best") -> Encoder:
        """Build the encoder of a run's checkpoint ("best", "newest" or a step) on the CPU; `sources` are the run's."""
        loaded = load_model(run, Ranks(0, 1, torch.device("cpu")), which, sources=sources, is_sharded=False)
        model = loaded.model
        facts = {
            "model_version": loaded.version,
            "step": loaded.step,
            "dim": run.config.model.vector_dim,
            "similarity": run.config.model.similarity,
        }
        statistics = {name: asdict(values) for name, values in sources.statistics.items()}
        weights = {name: value.detach() for name, value in model.state_dict().items()}
        return cls(Parts(facts, as_values(run.config), statistics, weights, _steps(sources)))

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> Encoder:
        """Load an encoder that `save` wrote. Raises ConfigError if there is none, DataError if it is damaged."""
        folder = Path(folder)
        try:
            sealed = SealedFolder.open(folder, MEND)
        except FileNotFoundError:
            raise ConfigError(f"{folder} holds no encoder: {MEND}") from None
        facts: dict[str, Any] = {}
        for name, kind in FACTS.items():
            if not isinstance(facts.setdefault(name, sealed.manifest.get(name)), kind):
                raise DataError(f"{folder / MANIFEST} has no {name}: it is not an encoder's; {MEND}")
        config = read_yaml(sealed.path(CONFIG), folder / CONFIG)
        learned = read_json(sealed.path(LEARNED), MEND, folder / LEARNED)
        if not is_learned(learned):
            raise DataError(f"{folder / LEARNED} does not hold what features learned: {MEND}")
        try:
            return cls(Parts(facts, config, learned, _read_weights(sealed), _read_steps(sealed)), device)
        except Misfit as error:
            raise DataError(f"{folder} {error}: do not trust it; {MEND}") from None

    def save(self, folder: Path) -> dict[str, str]:
        """Write the folder completely or not at all; return for each side's program "ok", or why there is none."""
        with new_folder(folder) as temporary:
            write_file(temporary / CONFIG, to_yaml(self.parts.config))
            write_json(temporary / LEARNED, self.parts.statistics)
            write_tensors(temporary / WEIGHTS, self.parts.weights)
            if self.parts.steps:
                np.savez(temporary / STEPS, **self.parts.steps)  # type: ignore[arg-type]
            programs: dict[str, str] = {side: self._write_program(side, temporary / f"{side}.pt2") for side in SIDES}
            seal(temporary, {**self.parts.facts, "programs": programs})
        return programs

    def columns(self, side: Side) -> list[str]:
        """Return the columns that rows of this side must have."""
        _check_side(side)
        return sorted({column for feature in self.schema.features(side) for column in feature.source_columns})

    def encode(self, side: Side, rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """Return (rows, dim) float32 vectors; (rows, vectors, dim) for users with several vectors.

        Raises DataError for a column that is missing or holds what training would refuse.
        """
        check_process(self._pid, "Encoder")
        features = self.features(side, rows)
        if not features.num_rows:
            several = self.model.vectors_per_user if side == "user" else 1
            return np.empty((0, several, self.dim) if several > 1 else (0, self.dim), np.float32)
        with self._lock:
            return encode(self.model, side, features, self._ranks()).cpu().numpy()

    def with_vectors(self, side: Side, rows: pa.Table | pa.RecordBatch) -> pa.RecordBatch:
        """Return ids and vectors of the rows, as in the export: for mapInArrow or map_batches."""
        _check_side(side)
        name = USER_ID if side == "user" else ITEM_ID
        table = _table(rows)
        if name not in table.column_names:
            raise DataError(f"The rows have no column {name!r}{nearest(name, table.column_names)}.")
        return pa.RecordBatch.from_pydict(
            {name: table[name].combine_chunks(), **vector_column(self.encode(side, table))}
        )

    def features(self, side: Side, rows: pa.Table | pa.RecordBatch) -> Columns:
        """Return the features of these rows, as training computes them."""
        _check_side(side)
        given = _table(rows)
        named = self.schema.features(side)
        for feature in named:
            for name in feature.source_columns:
                count = given.column_names.count(name)
                if count != 1:
                    found = f"no column {name!r}" if not count else f"{count} columns named {name!r}"
                    raise DataError(
                        f"The {side} rows have {found}, which feature {feature.name!r} reads"
                        f"{nearest(name, given.column_names) if not count else ''}."
                    )
        table = plain_table(given, self.columns(side))
        for feature in named:
            for name in feature.value_columns:
                check_kind(feature, table.schema.field(name).type, f"the {side} rows", name)
        learned = {
            feature.name: self.statistics[f"{side}:{feature.name}"] for feature in named if feature.learns_from_data
        }
        find = self._find if side == "user" else None
        columns = transform(named, self.schema.tables, learned, table, f"the {side} rows", item_rows=find)
        return columns if find is None else Columns(columns.num_rows, columns.sparse, columns.numbers, self._items)

    def inputs(self, side: Side, rows: pa.Table | pa.RecordBatch) -> dict[str, Tensor]:
        """Return the inputs of the exported program of this side for these rows."""
        return program_inputs(self.schema, side, self.features(side, rows))

    def _ranks(self) -> Ranks:
        return Ranks(0, 1, torch.device(self.device))

    def _write_program(self, side: Side, path: Path) -> str:
        """Return "ok", or why torch.export cannot export this tower; the encoder does not need the program."""
        try:
            exported = export_program(self.model, side)
        except ProgramError as error:
            return str(error)
        torch.export.save(exported, path)
        return "ok"


def _check_side(side: str) -> None:
    if side not in SIDES:
        raise ConfigError(f"There is no tower {side!r}{nearest(side, SIDES)}.")


def _table(rows: pa.Table | pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows


def _loaded_model(config: RunConfig, weights: Mapping[str, Tensor], device: str) -> TwoTower:
    """Return the TwoTower with these weights, which are compared with the config before memory is allocated."""
    model = build_whole_model(config, has_tables=False)
    if extra := sorted(weights.keys() - model.state_dict().keys()):
        raise Misfit(f"has weights of another model: {extra[0]} has no place in it")
    for name, expected in model.state_dict().items():
        found = weights.get(name)
        if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
            there = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise Misfit(f"has weights of another model: {name} is {there}, not {tuple(expected.shape)}")
        if found.is_floating_point() and found.numel() and not all(each.isfinite() for each in found.aminmax()):
            raise Misfit(f"has weights that are NaN or infinite, in {name}")
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


class Misfit(DataError):
    """Parts that do not make an encoder."""


def _steps(sources: FeatureDataset) -> dict[str, np.ndarray]:
    """Return what sequence steps need from the catalogue: the keys, and the lists of the attributes."""
    if not sources.steps_have_attributes:
        return {}
    catalogue = sources.catalogue
    found = {"keys": catalogue.keys}
    for name in sorted({name for feature in sources.schema.sequences for name in feature.attributes}):
        lists = catalogue.columns.sparse[name]
        found |= {f"offsets:{name}": lists.offsets, f"values:{name}": lists.values}
        if lists.weights is not None:
            found[f"weights:{name}"] = lists.weights
    return found


def _catalogue_of_steps(schema: Schema, steps: Mapping[str, np.ndarray]) -> tuple[Columns | None, Any]:
    """Return the catalogue's attributes and a function from keys to rows; None and None if no steps have attributes.

    Raises Misfit where the arrays are not as `_steps` makes them: the kernels that read them check no bounds.
    """
    attributes = {name for feature in schema.sequences for name in feature.attributes}
    if not attributes:
        return None, None
    keys = _array(steps, "keys", np.int64)
    tables = {feature.name: schema.table_of(feature) for feature in schema.item if feature.name in attributes}
    sparse = {name: _lists(steps, name, len(keys), table) for name, table in tables.items()}
    found = KeyTable(keys, np.zeros(KeyTable.num_slots(len(keys)), np.int32))
    if len(found.insert(0, len(keys))):
        raise Misfit(f"has keys in {STEPS} that are not distinct")
    return Columns(len(keys), sparse, {}), found.find


def _lists(steps: Mapping[str, np.ndarray], name: str, num_rows: int, table: TableSpec) -> Ragged:
    """Return the table rows that each item looks up for an attribute."""
    offsets, values = _array(steps, f"offsets:{name}", np.int64), _array(steps, f"values:{name}", np.integer)
    weights = _array(steps, f"weights:{name}", np.float32) if f"weights:{name}" in steps else None
    is_whole = len(offsets) == num_rows + 1 and offsets[0] == 0 and offsets[-1] == len(values)
    is_whole = is_whole and (np.diff(offsets) >= 0).all() and (weights is None or len(weights) == len(values))
    if not is_whole or (len(values) and not 0 <= values.min() <= values.max() < table.buckets):
        raise Misfit(f"has lists of {name!r} in {STEPS} that do not fit the catalogue or the table")
    return Ragged(offsets, values, weights)


def _array(steps: Mapping[str, np.ndarray], name: str, kind: Any) -> np.ndarray:
    found = steps.get(name)
    if found is None or found.ndim != 1 or not np.issubdtype(found.dtype, kind):
        raise Misfit(f"has no {name!r} in {STEPS}")
    return found


def _read_weights(sealed: SealedFolder) -> dict[str, Tensor]:
    try:
        return read_tensors(sealed.path(WEIGHTS))
    except (ValueError, RecursionError) as error:
        raise Misfit(f"has no tensors in {WEIGHTS} ({error})") from None


def _read_steps(sealed: SealedFolder) -> dict[str, np.ndarray]:
    if STEPS not in sealed.names:
        return {}
    try:
        with np.load(sealed.path(STEPS), allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:
        raise Misfit(f"has no arrays in {STEPS} ({type(error).__name__}: {error})") from None


def is_learned(value: Any) -> bool:
    """Return whether a JSON value has the form of Statistics by feature."""
    return isinstance(value, dict) and all(map(_is_statistics, value.values()))


def _is_statistics(value: Any) -> bool:
    lists = {"points": int | float, "words": int | str}
    names = {field.name for field in fields(Statistics)}
    if not isinstance(value, dict) or not set(value) <= names:
        return False
    return all(
        isinstance(each, list | tuple) and all(isinstance(part, lists[name]) for part in each)
        if name in lists
        else isinstance(each, int | float)
        for name, each in value.items()
    )
