"""The two towers in a folder: Arrow rows to vectors on one device, without a process group, a dataset or a run.

ENCODER/
  manifest.json    model_version, step, dim, similarity, SHA-256 of every file
  config.yaml      the run's config
  learned.json     what the features learned of the training data
  weights.pt       tables and towers, tensors alone
  steps.npz        where a sequence's steps have attributes: the catalogue's, by the items' keys
  user.pt2         each tower as a torch.export program, with its tables; see `Program`
  item.pt2
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trec_twotower.checkpoint import Checkpoints, model_version
from trec_twotower.config import RunConfig, as_values, validate
from trec_twotower.data.arrow_types import plain_table
from trec_twotower.data.dataset import ITEM_ID, USER_ID
from trec_twotower.data.features import Sources
from trec_twotower.data.lists import Lists
from trec_twotower.data.probing import KeyTable
from trec_twotower.data.transforms import Columns, Statistics, check_kind, transform
from trec_twotower.distributed import Ranks, quiet_libraries
from trec_twotower.encode import encode
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.export import LoadedModel, vector_column
from trec_twotower.files import new_folder, open_sealed, read_json, seal, write_file, write_json
from trec_twotower.model.two_tower import SIDES, TwoTower
from trec_twotower.program import ProgramError, export_program, program_inputs
from trec_twotower.run import Run
from trec_twotower.same_run import binding
from trec_twotower.schema import Side
from trec_twotower.yaml_files import read_yaml, to_yaml

MEND = "write it again: trec-twotower export RUN --encoder"
CONFIG, LEARNED, WEIGHTS, STEPS = "config.yaml", "learned.json", "weights.pt", "steps.npz"


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
        self.model = _plain_model(self.config, device)
        self.model.load_state_dict(parts.weights, assign=device == "cpu")
        self.model.eval()
        self._items, self._find = _catalogue_of_steps(parts.steps)
        self._lock = threading.Lock()

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
    def of(cls, run: Run, sources: Sources, which: str = "best") -> Encoder:
        """That of a run's checkpoint ("best", "newest" or a step), on the CPU; `sources` are the run's."""
        loaded = load_whole(run, sources, torch.device("cpu"), which)
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
        """One that `save` has written; raises ConfigError where there is none, DataError where it is damaged."""
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"{folder} holds no encoder: {MEND}")
        manifest = open_sealed(folder, MEND)
        facts = {name: manifest[name] for name in ("model_version", "step", "dim", "similarity", "programs")}
        weights = torch.load(folder / WEIGHTS, weights_only=True, mmap=True, map_location="cpu")
        steps = {}
        if (folder / STEPS).is_file():
            with np.load(folder / STEPS, allow_pickle=False) as arrays:
                steps = dict(arrays)
        return cls(Parts(facts, read_yaml(folder / CONFIG), read_json(folder / LEARNED, MEND), weights, steps), device)

    def save(self, folder: Path) -> dict[str, str]:
        """Write the folder, whole or not at all; tells of each side's program "ok", or why there is none."""
        with new_folder(folder) as temporary:
            write_file(temporary / CONFIG, to_yaml(self.parts.config))
            write_json(temporary / LEARNED, self.parts.statistics)
            torch.save(self.parts.weights, temporary / WEIGHTS)
            if self.parts.steps:
                np.savez(temporary / STEPS, **self.parts.steps)  # type: ignore[arg-type]
            programs: dict[str, str] = {side: self._write_program(side, temporary / f"{side}.pt2") for side in SIDES}
            seal(temporary, {**self.parts.facts, "programs": programs})
        return programs

    def columns(self, side: Side) -> list[str]:
        """The columns that rows of this side must have."""
        _check_side(side)
        return sorted({column for feature in self.schema.features(side) for column in feature.all_columns})

    def encode(self, side: Side, rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """(rows, dim) float32, of users with several vectors (rows, vectors, dim).

        Raises DataError for a column that is missing or holds what training would refuse.
        """
        features = self.features(side, rows)
        if not features.num_rows:
            several = self.model.vectors_per_user if side == "user" else 1
            return np.empty((0, several, self.dim) if several > 1 else (0, self.dim), np.float32)
        with self._lock:
            return encode(self.model, side, features, self._ranks()).cpu().numpy()

    def with_vectors(self, side: Side, rows: pa.Table | pa.RecordBatch) -> pa.RecordBatch:
        """The rows' ids beside their vectors, as the export has them: for mapInArrow or map_batches."""
        _check_side(side)
        name = USER_ID if side == "user" else ITEM_ID
        table = _table(rows)
        if name not in table.column_names:
            raise DataError(f"The rows have no column {name!r}{nearest(name, table.column_names)}.")
        return pa.RecordBatch.from_pydict(
            {name: table[name].combine_chunks(), **vector_column(self.encode(side, table))}
        )

    def features(self, side: Side, rows: pa.Table | pa.RecordBatch) -> Columns:
        """What training would make of these rows."""
        _check_side(side)
        given = _table(rows)
        named = self.schema.features(side)
        for feature in named:
            for name in feature.all_columns:
                count = given.column_names.count(name)
                if count != 1:
                    found = f"no column {name!r}" if not count else f"{count} columns named {name!r}"
                    raise DataError(
                        f"The {side} rows have {found}, which feature {feature.name!r} reads"
                        f"{nearest(name, given.column_names) if not count else ''}."
                    )
        table = plain_table(given, self.columns(side))
        for feature in named:
            for name in feature.all_columns:
                if name not in (feature.weights, feature.times, feature.actions, feature.until):
                    check_kind(feature, table.schema.field(name).type, f"the {side} rows", name)
        learned = {feature.name: self.statistics[f"{side}:{feature.name}"] for feature in named if feature.learns}
        find = self._find if side == "user" else None
        columns = transform(named, self.schema.tables, learned, table, f"the {side} rows", item_rows=find)
        return columns if find is None else Columns(columns.num_rows, columns.sparse, columns.numbers, self._items)

    def inputs(self, side: Side, rows: pa.Table | pa.RecordBatch) -> dict[str, Tensor]:
        """What the exported program of this side takes for these rows."""
        return program_inputs(self.schema, side, self.features(side, rows))

    def _ranks(self) -> Ranks:
        return Ranks(0, 1, torch.device(self.device))

    def _write_program(self, side: Side, path: Path) -> str:
        """ "ok", or why torch.export cannot have this tower: the encoder itself does not need it."""
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


def load_whole(run: Run, sources: Sources, device: torch.device, which: str = "best") -> LoadedModel:
    """As export.load_model, but with whole tables on one device, and in no process group."""
    checkpoints = Checkpoints(
        run.folder / "checkpoints", Ranks(0, 1, torch.device("cpu")), settings=binding(run.config)
    )
    path = checkpoints.choose(which)
    model = _plain_model(run.config, "cpu")
    manifest = checkpoints.load(path, model)
    return LoadedModel(run, sources, model.to(device).eval(), model_version(path), manifest["step"])


def _plain_model(config: RunConfig, device: str) -> TwoTower:
    """The TwoTower with whole tables on one device, whose weights are yet to come."""
    ranks = Ranks(0, 1, torch.device(device))
    model = TwoTower(config.feature_schema, config.model, config.loss, ranks)
    for tower in (model.user_tower, model.item_tower):
        tower.trains_as(config.train.model_copy(update={"compile": False}), ranks)
    for tables in (model.tables, model.lists):
        if tables is not None:
            tables.to_empty(device=device)
    return model.to(device).float()  # also tables that are kept in fp16: torch's own pooling wants one type


def _steps(sources: Sources) -> dict[str, np.ndarray]:
    """What the steps of sequences need of the catalogue: keys, and the lists of the attributes."""
    if not sources.steps_have_attributes:
        return {}
    catalogue = sources.catalogue
    slots = np.zeros(KeyTable.num_slots(len(catalogue.keys)), np.int32)
    KeyTable(catalogue.keys, slots).insert(0, len(catalogue.keys))
    found = {"keys": catalogue.keys, "slots": slots}
    for name in sorted({name for feature in sources.schema.sequences for name in feature.attributes}):
        lists = catalogue.columns.sparse[name]
        found |= {f"offsets:{name}": lists.offsets, f"values:{name}": lists.values}
        if lists.weights is not None:
            found[f"weights:{name}"] = lists.weights
    return found


def _catalogue_of_steps(steps: Mapping[str, np.ndarray]) -> tuple[Columns | None, Any]:
    """The catalogue's attributes, and what finds the rows of keys; None and None where no steps have attributes."""
    if not steps:
        return None, None
    names = [name.removeprefix("offsets:") for name in steps if name.startswith("offsets:")]
    sparse = {
        name: Lists(steps[f"offsets:{name}"], steps[f"values:{name}"], steps.get(f"weights:{name}")) for name in names
    }
    return Columns(len(steps["keys"]), sparse, {}), KeyTable(steps["keys"], steps["slots"]).find
