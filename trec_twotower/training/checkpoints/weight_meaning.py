"""The meaning of each weight of a model, for comparison with the weights of another run.

The rows of a table stand for ids by a hash, for words or for bins of numbers; the columns of a layer for the features
that it reads; a layer for its place among the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trec_twotower.config.base import Side
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import (
    LanguageModelFeature,
    NumericFeature,
    VocabularyFeature,
)
from trec_twotower.config.losses import LearnedTemperature
from trec_twotower.config.model import TableSpec, TowerConfig
from trec_twotower.config.run_config import RunConfig
from trec_twotower.config.schema import Schema
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.errors import ConfigError
from trec_twotower.model.embeddings import table_in
from trec_twotower.model.tower import Tower, average_of, encoder_name
from trec_twotower.model.tower_layers import Crosses, Experts, FeatureGates, Missing, ShortLong, Summed
from trec_twotower.training.run_dir import STATISTICS, Run

FORGOTTEN = ("frequency.", "queue.")  # what a run remembers of its own steps
BY_AGE = ("log_weight_AH", "place", "place_AD")  # parameters of encoders with a row for each age of a step
# Settings of sequence encoders that do not change what their weights mean.
SIMILAR_ENCODERS = frozenset(f"encoder.{name}" for name in ("dropout", "fastest", "slowest", "iterations"))


@dataclass(frozen=True)
class Bins:
    """The rows of a table of bins: row 0 is null's, the others are in the order of the points."""

    points: tuple[float, ...]
    is_soft: bool
    num_rows: int


@dataclass(frozen=True)
class Words:
    """The rows of a vocabulary's table: null, the unknown, the words in their order, and rows that nobody looks up."""

    words: tuple[int | str, ...]
    num_rows: int


# The meaning of each index along a dimension (a range: the age of a step); None: its number only.
Axis = Sequence[Hashable] | Words | Bins | None


@dataclass(frozen=True)
class Weight:
    """A tensor of a model, and what it means; two models' weights are compared by all but `name`."""

    name: str  # in the model's state
    label: str  # for people: "table brand"
    size: tuple[int, ...]
    axes: tuple[Axis, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)  # that must agree
    rows: frozenset[str] = frozenset()  # of a table: what its rows stand for; one kind in common is enough


Layout = dict[tuple[Hashable, ...], Weight]


@dataclass(frozen=True)
class Meaning:
    """All that decides what a run's weights mean."""

    config: RunConfig
    statistics: Mapping[str, Statistics]  # by side:feature
    files: Mapping[str, str]  # SHA-256 of the files that the config names, by path

    @classmethod
    def of_saved(cls, run: Run) -> Meaning:
        """Return the meaning of the weights of a run. Raises ConfigError if its statistics are missing."""
        if not run.has_learned:
            raise ConfigError(
                f"{run.folder} has no {STATISTICS}, the statistics of its features: no run can start with its "
                "weights. Restore that file, or give another run."
            )
        learned = run.learned()
        numbers = {name: Statistics(**values) for name, values in learned["numbers"].items()}
        return cls(run.config, numbers, learned["files"])

    def layout(self, sizes: Mapping[str, tuple[int, ...]]) -> Layout:
        """Return the meaning of each tensor with these names and sizes in a model of this config."""
        schema = self.config.feature_schema
        found: Layout = {}
        for name, size in sizes.items():
            if (table := table_in(name)) is not None and table in schema.tables:
                found["table", table] = self._table(name, table, size, schema)
            elif name == "temperature.position":
                limits = self.config.loss.parameters.get("temperature")
                bounds = {"low": limits.low, "high": limits.high} if isinstance(limits, LearnedTemperature) else {}
                found[(name,)] = Weight(name, "the learned temperature", size, (), bounds)
            elif not name.startswith((*FORGOTTEN, "user_tower.", "item_tower.")):
                found[(name,)] = Weight(name, name, size, (None,) * len(size))
        for side, config in self.config.model.towers:
            found |= self._tower(side, config, schema, sizes)
        return found

    def _table(self, name: str, table: str, size: tuple[int, ...], schema: Schema) -> Weight:
        spec, label = schema.tables[table], f"table {table}"
        readers = [
            (side, each) for side, each in schema.layout.table_pairs if table in (each.table_name, each.delta_table)
        ]
        for side, feature in readers:
            learned = self.statistics.get(f"{side}:{feature.name}", Statistics())
            if isinstance(feature, VocabularyFeature):
                words = Words(learned.words, size[0])
                return Weight(name, label, size, (words, None), rows=frozenset({"words of a vocabulary"}))
            if isinstance(feature, NumericFeature) and feature.bins is not None:
                points = feature.bins if isinstance(feature.bins, tuple) else learned.points
                bins = Bins(tuple(points), feature.soft, size[0])
                return Weight(name, label, size, (bins, None), {"soft": feature.soft}, frozenset({"bins of numbers"}))
        kinds = frozenset(feature.row_meaning for _, feature in readers)
        return Weight(name, label, size, (None, None), _hashing(spec), kinds)

    def _tower(self, side: Side, config: TowerConfig, schema: Schema, sizes: Mapping[str, tuple[int, ...]]) -> Layout:
        model = self.config.model
        dim = model.vector_dim if side == "user" else model.dim
        with torch.device("meta"):  # without memory: its parts are looked at, not used
            place = {name: schema.layout.part_index(side, name) for name in config.named_features}
            tower = Tower(schema.layout.part_widths(side), dim, config, is_unit=False, place=place.__getitem__)
        found: Layout = {}
        for index, role, rest, axes, settings in _TowerParts(config, schema, side).walk(tower):
            name = f"layers.{index}.{rest}"
            label = f"{side} tower's {role}" + (" (bias)" if rest.endswith("bias") else "")
            self._add(found, side, name, label, (role, rest), axes, settings, sizes)
        for feature in schema.features(side):
            prefix = f"encoders.{encoder_name(feature.name)}."
            for name in [each for each in sizes if each.startswith(f"{side}_tower.{prefix}")]:
                rest = name.removeprefix(f"{side}_tower.{prefix}")
                size = sizes[name]
                by_age = rest.rpartition(".")[2] in BY_AGE and len(size) == 2
                axes = (range(size[0]), None) if by_age else (None,) * len(size)
                label, key = f"layers of {side} feature {feature.name}", ("encoder", feature.name, rest)
                self._add(found, side, prefix + rest, label, key, axes, self._encoding(feature), sizes)
        return found

    @staticmethod
    def _add(
        found: Layout,
        side: Side,
        name: str,
        label: str,
        key: tuple[Hashable, ...],
        axes: tuple[Axis, ...],
        settings: Mapping[str, Any],
        sizes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Add a weight of a tower, and its average if it has one, with the same meaning."""
        of_average = f"{side}_tower.{average_of(name)}"
        for full, what in ((f"{side}_tower.{name}", "weight"), (of_average, "average")):
            if full in sizes:
                shown = label if what == "weight" else f"{label}, averaged"
                found[what, side, *key] = Weight(full, shown, sizes[full], axes, settings)

    def _encoding(self, feature: FeatureSpec) -> dict[str, Any]:
        """Return the settings of a feature's layers that determine what their weights mean."""
        settings = {name: each for name, each in feature.layer_settings.items() if name not in SIMILAR_ENCODERS}
        if isinstance(feature, LanguageModelFeature):
            folder = Path(feature.folder)
            digests = {Path(path).name: each for path, each in self.files.items() if Path(path).parent == folder}
            settings["language model"] = tuple(sorted(digests.items()))
        return settings


def _hashing(spec: TableSpec) -> dict[str, Any]:
    return {"buckets": spec.buckets, "hashing": spec.hashing, "seed": spec.seed, "hashes": spec.hashes}


class _TowerParts:
    """Goes through a tower's layers: what each is, and what the axes of its parameters stand for."""

    def __init__(self, config: TowerConfig, schema: Schema, side: Side) -> None:
        self.config, self.schema, self.side = config, schema, side
        self.columns = _columns(schema, side)
        self.parts = _of_parts(schema, side)
        self.whole: list[Hashable] = [label for part in self.columns for label in part]
        self.reads: list[Hashable] | None = self.whole  # the meaning of the next layer's input; None: none
        self.behind = "features"  # the part that the next layer follows
        self.num_linear = 0

    def walk(self, tower: Tower) -> Iterator[tuple[int, str, str, tuple[Axis, ...], dict[str, Any]]]:
        """Index, role, parameter, axes and settings of each parameter."""
        for index, module in enumerate(tower.layers):
            behind = self.behind
            role, axes = self._look(module)
            settings = {"input": behind} if isinstance(module, nn.Linear | Experts) else {}
            if isinstance(module, Summed | ShortLong | Experts | nn.Linear):
                self.behind, self.reads = role, None
            for name, each in axes.items():
                yield index, role, name, each, settings

    def _look(self, module: nn.Module) -> tuple[str, dict[str, tuple[Axis, ...]]]:
        """Return the role of a part, and the axes of its parameters."""
        match module:
            case Missing():
                return "learned vectors of missing features", {
                    "vector_E": (self._of(self.config.missing_vectors or ()),)
                }
            case FeatureGates():
                return "gates of features", self._gates()
            case Crosses():
                names = [f"layers.{number}" for number in range(len(module.layers))]
                axes: dict[str, tuple[Axis, ...]] = {f"{name}.weight": (self.whole, self.whole) for name in names}
                return "crosses of features", axes | {f"{name}.bias": (self.whole,) for name in names}
            case Summed():
                return "sum of features", {}
            case ShortLong():
                return "short and long term", self._short_long()
            case Experts():
                names = ["router", *(f"experts.{number}.0" for number in range(len(module.experts)))]
                return "experts", self._linear(*names)
            case nn.Linear():
                is_last = self.config.project and self.num_linear == len(self.config.mlp)
                self.num_linear += 1
                return "last layer" if is_last else f"hidden layer {self.num_linear}", self._linear("")
        return "", {}

    def _linear(self, *names: str) -> dict[str, tuple[Axis, ...]]:
        found: dict[str, tuple[Axis, ...]] = {}
        for name in names:
            before = f"{name}." if name else ""
            found |= {f"{before}weight": (None, self.reads), f"{before}bias": (None,)}
        return found

    def _gates(self) -> dict[str, tuple[Axis, ...]]:
        assert self.config.gating is not None
        by = self._of(self.config.gating.by) if self.config.gating.by else self.parts
        inward: dict[str, tuple[Axis, ...]] = {"squeeze.weight": (None, by), "squeeze.bias": (None,)}
        return inward | {"excite.weight": (self.parts, None), "excite.bias": (self.parts,)}

    def _short_long(self) -> dict[str, tuple[Axis, ...]]:
        short = self._of(self.config.short_term)
        rest = [label for label in self.whole if label not in set(short)]
        weights: dict[str, tuple[Axis, ...]] = {"short.weight": (None, short), "long.weight": (None, rest)}
        weights["gate.weight"] = (None, self.whole)
        return weights | {f"{name}.bias": (None,) for name in ("short", "long", "gate")}

    def _of(self, names: Sequence[str]) -> list[Hashable]:
        """Return the meaning of the columns of some features, in their order among all."""
        chosen = sorted({self.schema.layout.part_index(self.side, name) for name in names})
        return [label for number in chosen for label in self.columns[number]]


def _columns(schema: Schema, side: Side) -> list[list[Hashable]]:
    """Return the meaning of each column of a tower's input, in the order of FeatureLayout.part_widths."""
    found: list[list[Hashable]] = []
    for feature in schema.layout.table_features(side):
        found.append(_labels(feature, schema.table_of(feature).dim, "table"))
    for feature in schema.layout.layer_features(side):
        found.append(_labels(feature, feature.layers_width or 0, "layers"))
    numeric = [each for each in schema.layout.plain_numbers(side) if isinstance(each, NumericFeature)]
    numbers = [label for each in numeric for label in _labels(each, each.num_numbers, each.normalize)]
    return [*found, numbers] if numbers else found


def _labels(feature: FeatureSpec, width: int, kind: str) -> list[Hashable]:
    return [(feature.name, kind, width, column) for column in range(width)]


def _of_parts(schema: Schema, side: Side) -> list[Hashable]:
    """Return the meaning of each gate of a tower: one feature, or all plain numbers."""
    numbers = frozenset(feature.name for feature in schema.layout.plain_numbers(side))
    named: list[Hashable] = [
        feature.name for feature in (*schema.layout.table_features(side), *schema.layout.layer_features(side))
    ]
    return [*named, numbers] if numbers else named
