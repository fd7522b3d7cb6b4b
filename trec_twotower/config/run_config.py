"""The config of a run: all sections, and the settings that identify the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from trec_twotower.config.base import Settings, as_values, validate
from trec_twotower.config.checks import CHECKS
from trec_twotower.config.data import DataConfig
from trec_twotower.config.evaluation import EvaluateConfig, IndexConfig
from trec_twotower.config.features import Feature
from trec_twotower.config.losses import Loss, SoftmaxLoss
from trec_twotower.config.model import ModelConfig, TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.config.training import CheckpointConfig, TrainConfig
from trec_twotower.errors import ConfigError

# Settings that may change when a run is resumed, because they change neither batches nor weights.
_FREE_SETTINGS = """
    train.epochs train.log_every train.log_to train.evaluate_every train.timeout_s train.first_timeout_s
    train.max_failures train.threads train.device train.profile_steps train.pipeline
    checkpoint evaluate index run_dir data.dataset data.prefetch data.threads data.cache data.cache_gb
"""
_FREE = frozenset(_FREE_SETTINGS.split())
_PLACEMENT = (".sharding", ".shard_columns", ".kernel", ".cache_share")  # settings of a table that may change, too
TRAINED = "trained"  # subdirectory for the run that is trained before spectral vectors are added


class RunConfig(Settings):
    """All settings of one run, for `train` and, from the run directory, for every later stage."""

    data: DataConfig  # the dataset, batches and the order of rows
    tables: dict[str, TableSpec] = Field(default_factory=dict)  # embedding tables that features share, by name
    user: tuple[Feature, ...]  # features of the user tower
    item: tuple[Feature, ...]  # features of the item tower
    model: ModelConfig = ModelConfig()  # both towers and the similarity of their vectors
    loss: Loss = SoftmaxLoss()  # the loss and its negatives
    train: TrainConfig = TrainConfig()  # duration, optimizer, initial weights, number types, time limits
    checkpoint: CheckpointConfig = CheckpointConfig()  # when checkpoints are written, and how many are kept
    evaluate: EvaluateConfig = EvaluateConfig()  # metrics of validation and of `evaluate`
    index: IndexConfig = IndexConfig()  # the search index that `index` builds
    run_dir: Path | None = None  # directory that the run is written to; default: runs/NAME for a config NAME.yaml

    @property
    def feature_schema(self) -> Schema:
        return Schema.build(self.tables, self.user, self.item)

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        schema = self.feature_schema
        for check in CHECKS:
            check(self, schema)
        return self

    @property
    def ends_in_closed_form(self) -> bool:
        """Return whether spectral vectors are added after training."""
        return self.train.spectral is not None and self.train.spectral.when == "after_training"

    @property
    def without_closed_form(self) -> RunConfig:
        """Return the config of the run that is trained before spectral vectors are added, in RUN/trained."""
        spectral, schema = self.train.spectral, self.feature_schema
        assert spectral is not None
        user = [feature for feature in self.user if feature.name != spectral.history]
        item = [feature for feature in self.item if feature.name != spectral.item]
        [item_id] = [feature for feature in self.item if feature.name == spectral.item]
        tables = {feature.table_name for feature in (*user, *item)}
        values = as_values(self)
        values["user"], values["item"] = [as_values(each) for each in user], [as_values(each) for each in item]
        values["tables"] = {name: as_values(table) for name, table in self.tables.items() if name in tables}
        values["model"]["dim"] -= schema.table_of(item_id).dim
        values["train"]["spectral"] = None
        values["run_dir"] = None if self.run_dir is None else str(self.run_dir / TRAINED)
        return validate(RunConfig, values, "the config without train.spectral")


def binding(config: RunConfig) -> dict[str, Any]:
    """Return the settings that identify a run, flat: {"model.dim": 64, ...}."""
    return _flat(as_values(config))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def add(value: Any, place: str) -> None:
        if place in _FREE or (place.startswith("tables.") and place.endswith(_PLACEMENT)):
            return
        if place == "data.follow":
            flat[place] = None if value is None else {}  # whether the run follows, but not how long it waits
        elif isinstance(value, dict):
            for name, inner in value.items():
                add(inner, f"{place}.{name}" if place else name)
        elif place in ("user", "item"):
            flat[place] = [feature["name"] for feature in value]  # in the order of the tower's input
            for feature in value:
                add(feature, f"{place}.{feature['name']}")
        else:
            flat[place] = value

    add(values, "")
    return flat


def config_hash(config: RunConfig) -> str:
    """Return twelve hex digits that change with any setting that identifies a run."""
    return hashlib.sha256(json.dumps(binding(config), sort_keys=True).encode()).hexdigest()[:12]


def check_same_run(saved: RunConfig, config: RunConfig, run_dir: Path) -> None:
    """Raise ConfigError listing the settings in which the config of a run directory differs from `config`."""
    if found := differences(binding(saved), config):
        raise ConfigError(
            f"{run_dir} belongs to another config: {found}. Set another run_dir=..., or restore these settings."
        )


def differences(saved: Mapping[str, Any], config: RunConfig) -> str:
    """Return the settings in which a saved `binding` differs from `config`, as text; empty if there are none.

    A setting that the saved run lacks, because it is older, counts as its default.
    """
    now, changed = binding(config), _flat(config.model_dump(mode="json", exclude_defaults=True))
    names = []
    for name in sorted({*saved, *now}):
        parts = name.split(".")
        groups = {".".join(parts[:count]) for count in range(1, len(parts))} - {"user", "item"}
        is_new = name not in saved and name not in changed and saved.keys().isdisjoint(groups)
        if saved.get(name) != now.get(name) and not is_new:
            names.append(name)
    text = "; ".join(f"{name} was {saved.get(name)!r}, now {now.get(name)!r}" for name in names[:8])
    return text + (f" (and {len(names) - 8} more)" if len(names) > 8 else "")
