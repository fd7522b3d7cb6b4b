"""`train --init-from RUN`: the weights of another run, each row and column where this model has the same thing.

A weight is copied where both models mean the same by it. The rows of a vocabulary are matched by word, those of bins by
value, the columns of a layer by the feature that they read. What means something else (a table with another hash, a
layer behind another layer) keeps its first weights, and the report names the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trec_twotower.checkpoint import MODEL, Checkpoints, whole_size
from trec_twotower.config import RunConfig, TowerConfig
from trec_twotower.data.numbers import Statistics
from trec_twotower.data.vocabulary import FIRST_WORD, NULL_ROW, UNKNOWN_ROW
from trec_twotower.errors import ConfigError
from trec_twotower.model.embedding import table_in
from trec_twotower.model.parts import AlignedLinear, Crosses, Experts, FeatureGates, Missing, ShortLong, Summed
from trec_twotower.model.tower import Tower, average_of, encoder_name
from trec_twotower.model.two_tower import SIDES
from trec_twotower.run import Run
from trec_twotower.schema import FeatureSpec, Schema, Side, TableSpec

FORGOTTEN = ("frequency.", "queue.")  # what a run remembers of its own steps
BY_AGE = ("log_weight_AH", "place", "place_AD")  # parameters of encoders with a row for each age of a step
MOST_NAMES = 8  # in one line of the report
SIMILAR_ENCODERS = frozenset({"dropout", "fastest", "slowest", "iterations"})  # settings that leave the meaning


# ------------------------------------------------------------ what weights mean


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


# What each index along a dimension stands for (a range: the age of a step); None: nothing but its number.
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
        """That of a run whose training has begun."""
        learned = run.learned()
        numbers = {name: Statistics(**values) for name, values in learned["numbers"].items()}
        return cls(run.config, numbers, learned["files"])

    def layout(self, sizes: Mapping[str, tuple[int, ...]]) -> Layout:
        """What each tensor of these names and sizes means in a model of this config."""
        schema = self.config.feature_schema
        found: Layout = {}
        for name, size in sizes.items():
            if (table := table_in(name)) is not None and table in schema.tables:
                found["table", table] = self._table(name, table, size, schema)
            elif name == "temperature.position":
                limits = self.config.loss.temperature
                bounds = {"low": getattr(limits, "low", None), "high": getattr(limits, "high", None)}
                found[(name,)] = Weight(name, "the learned temperature", size, (), bounds)
            elif not name.startswith((*FORGOTTEN, "user_tower.", "item_tower.")):
                found[(name,)] = Weight(name, name, size, (None,) * len(size))
        for side, config in zip(SIDES, (self.config.model.user_tower, self.config.model.item_tower), strict=True):
            found |= self._tower(side, config, schema, sizes)
        return found

    def _table(self, name: str, table: str, size: tuple[int, ...], schema: Schema) -> Weight:
        spec, label = schema.tables[table], f"table {table}"
        readers = [(side, each) for side, each in schema.sparse_pairs if table in (each.table_name, _delta_of(each))]
        for side, feature in readers:
            learned = self.statistics.get(f"{side}:{feature.name}", Statistics())
            if feature.vocabulary is not None:
                words = Words(learned.words, size[0])
                return Weight(name, label, size, (words, None), rows=frozenset({"words of a vocabulary"}))
            if feature.bins is not None:
                points = feature.bins if isinstance(feature.bins, tuple) else learned.points
                bins = Bins(tuple(points), feature.soft, size[0])
                return Weight(name, label, size, (bins, None), {"soft": feature.soft}, frozenset({"bins of numbers"}))
        kinds = frozenset(_rows_of(feature) for _, feature in readers)
        return Weight(name, label, size, (None, None), _hashing(spec), kinds)

    def _tower(self, side: Side, config: TowerConfig, schema: Schema, sizes: Mapping[str, tuple[int, ...]]) -> Layout:
        model = self.config.model
        dim = model.vector_dim if side == "user" else model.dim
        with torch.device("meta"):  # without memory: its parts are looked at, not used
            place = {name: schema.place(side, name) for name in _names(config)}
            tower = Tower(schema.widths(side), dim, config, is_unit=False, place=place.__getitem__)
        found: Layout = {}
        for (part, rest), axes, settings in _parts(tower, config, schema, side):
            name = f"layers.{part.index}.{rest}"
            label = f"{side} tower's {part.role}" + (" (bias)" if rest.endswith("bias") else "")
            self._add(found, side, name, label, (part.role, rest), axes, settings, sizes)
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
        """A weight of a tower, and its average where there is one, which means the same."""
        of_average = f"{side}_tower.{average_of(name)}"
        for full, what in ((f"{side}_tower.{name}", "weight"), (of_average, "average")):
            if full in sizes:
                shown = label if what == "weight" else f"{label}, averaged"
                found[what, side, *key] = Weight(full, shown, sizes[full], axes, settings)

    def _encoding(self, feature: FeatureSpec) -> dict[str, Any]:
        """The settings of a feature's layers that change what their weights mean."""
        if feature.kind == "sequence":
            spec = feature.encoding.model_dump()
            return {f"encoder.{name}": value for name, value in spec.items() if name not in SIMILAR_ENCODERS}
        if feature.is_tokens:
            folder = Path(str(feature.folder))
            digests = {Path(path).name: each for path, each in self.files.items() if Path(path).parent == folder}
            return {"language model": tuple(sorted(digests.items()))}
        if feature.kind == "vector":
            return {"unit_length": feature.unit_length}
        return {"normalise": feature.normalise}


def _delta_of(feature: FeatureSpec) -> str | None:
    return feature.delta_table if feature.delta else None


def _hashing(spec: TableSpec) -> dict[str, Any]:
    return {"buckets": spec.buckets, "hashing": spec.hashing, "seed": spec.seed, "hashes": spec.hashes}


def _rows_of(feature: FeatureSpec) -> str:
    """What a hashed row of a table stands for, as this feature reads it."""
    match feature.kind:
        case "category":
            return "category (row 0 is null's)"
        case "cross":
            return f"cross of {', '.join(feature.columns or ())}"
        case "text":
            return f"words: {feature.words}, characters: {feature.characters}"
        case "time":
            return f"{feature.part} in {feature.zone}"
    return "ids"


def _names(config: TowerConfig) -> set[str]:
    """All features that a tower's settings name."""
    by = config.gating.by if config.gating is not None else ()
    return {*config.drop, *(config.missing or ()), *config.unit, *by, *config.short, *config.wide}


@dataclass(frozen=True)
class _Part:
    """A module of a tower's layers: its index there, and what it does."""

    index: int
    role: str


def _parts(
    tower: Tower, config: TowerConfig, schema: Schema, side: Side
) -> Iterator[tuple[tuple[_Part, str], tuple[Axis, ...], dict[str, Any]]]:
    """Each parameter of a tower's layers, what its axes stand for, and what it follows."""
    columns = _columns(schema, side)
    parts = _of_parts(schema, side)
    whole = [label for part in columns for label in part]
    reads: list[Hashable] | None = list(whole)  # what the next layer's input stands for; None: the layer before it
    follows, hidden = "features", 0

    def of(places: Sequence[str]) -> list[Hashable]:
        chosen = sorted({schema.place(side, name) for name in places})
        return [label for number in chosen for label in columns[number]]

    for index, module in enumerate(tower.layers):
        axes: dict[str, tuple[Axis, ...]] = {}
        role = type(module).__name__
        settings: dict[str, Any] = {}
        if isinstance(module, Missing):
            role, axes = "learned vectors of missing features", {"vector_E": (of(config.missing or ()),)}
        elif isinstance(module, FeatureGates):
            assert config.gating is not None
            told = of(config.gating.by) if config.gating.by else parts
            axes = {"squeeze.weight": (None, told), "squeeze.bias": (None,)}
            axes |= {"excite.weight": (parts, None), "excite.bias": (parts,)}
            role = "gates of features"
        elif isinstance(module, Crosses):
            role = "crosses of features"
            for number in range(len(module.layers)):
                axes |= {f"layers.{number}.weight": (whole, whole), f"layers.{number}.bias": (whole,)}
        elif isinstance(module, ShortLong):
            short = of(config.short)
            rest = [label for label in whole if label not in set(short)]
            axes = {"short.weight": (None, short), "long.weight": (None, rest), "gate.weight": (None, whole)}
            axes |= {f"{name}.bias": (None,) for name in ("short", "long", "gate")}
            role, reads = "short and long term", None
        elif isinstance(module, Experts):
            role, settings = "experts", {"behind": follows}
            axes = {"router.weight": (None, reads), "router.bias": (None,)}
            for number in range(len(module.experts)):
                axes |= {f"experts.{number}.0.weight": (None, reads), f"experts.{number}.0.bias": (None,)}
            reads = None
        elif isinstance(module, AlignedLinear):
            is_last = config.project and hidden == len(config.mlp)
            role, settings = "last layer" if is_last else f"hidden layer {hidden + 1}", {"behind": follows}
            axes, hidden, reads = {"weight": (None, reads), "bias": (None,)}, hidden + 1, None
        if isinstance(module, Summed):
            follows, reads = "the sum of features", None
        elif reads is None and axes:
            follows = role
        for rest_of_name, each in axes.items():
            yield (_Part(index, role), rest_of_name), each, settings


def _columns(schema: Schema, side: Side) -> list[list[Hashable]]:
    """What each column of a tower's input stands for, by the places of `Schema.widths`."""
    found: list[list[Hashable]] = []
    for feature in schema.sparse(side):
        found.append(_labels(feature, schema.table_of(feature).dim, "table"))
    for feature in schema.layered(side):
        found.append(_labels(feature, feature.layers_width, "layers"))
    numbers = [label for each in schema.numbers(side) for label in _labels(each, each.num_numbers, each.normalise)]
    return [*found, numbers] if numbers else found


def _labels(feature: FeatureSpec, width: int, kind: str) -> list[Hashable]:
    return [(feature.name, kind, width, column) for column in range(width)]


def _of_parts(schema: Schema, side: Side) -> list[Hashable]:
    """What each of a tower's gates stands for: one feature, or all plain numbers."""
    numbers = frozenset(feature.name for feature in schema.numbers(side))
    named: list[Hashable] = [feature.name for feature in (*schema.sparse(side), *schema.layered(side))]
    return [*named, numbers] if numbers else named


# ------------------------------------------------------------ which weights fit


@dataclass(frozen=True)
class Transfer:
    """One weight of the new model, and where its numbers come from: nowhere if there is a `reason`."""

    new: Weight
    old: Weight | None
    sources: tuple[np.ndarray | None, ...] = ()  # per axis: the old index of each new one, -1: none; None: the same
    reason: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the whole weight is copied as it is."""
        return not self.reason and all(each is None for each in self.sources)


def transfers(new: Layout, old: Layout) -> list[Transfer]:
    """What becomes of each weight of a new model, given those of an old one."""
    return [_transfer(weight, old.get(key)) for key, weight in new.items()]


def _transfer(new: Weight, old: Weight | None) -> Transfer:
    if old is None:
        return Transfer(new, None, reason="not in that run")
    if new.rows and old.rows and not new.rows & old.rows:
        there, here = (" and ".join(sorted(rows)) for rows in (old.rows, new.rows))
        return Transfer(new, old, reason=f"its rows were {there}, now {here}")
    for name in sorted({*new.settings, *old.settings}):
        there, here = old.settings.get(name), new.settings.get(name)
        if there != here:
            what = f"{name} changed" if isinstance(here, tuple) else f"{name} was {there}, now {here}"
            return Transfer(new, old, reason=what)
    if len(new.size) != len(old.size):
        return Transfer(new, old, reason=_sizes(new, old))
    found: list[np.ndarray | None] = []
    for new_axis, old_axis, length, before in zip(new.axes, old.axes, new.size, old.size, strict=True):
        if new_axis is None and old_axis is None:
            if length != before:
                return Transfer(new, old, reason=_sizes(new, old))
            found.append(None)
        elif new_axis is None or old_axis is None:
            return Transfer(new, old, reason="its inputs are not the same kind")
        else:
            source = _source(new_axis, old_axis)
            if source is not None and not (source >= 0).any():
                return Transfer(new, old, reason="that run has none of what it reads")
            found.append(source)
    return Transfer(new, old, tuple(found))


def _source(new: Axis, old: Axis) -> np.ndarray | None:
    """The old index of each new one, -1: none; None where all are the same."""
    if new == old:
        return None
    if isinstance(new, Bins) and isinstance(old, Bins):
        return _rows_of_bins(new, old)
    if isinstance(new, Words) and isinstance(old, Words):
        place = {word: FIRST_WORD + number for number, word in enumerate(old.words)}
        spare = [-1] * (new.num_rows - FIRST_WORD - len(new.words))
        return np.array([NULL_ROW, UNKNOWN_ROW, *(place.get(word, -1) for word in new.words), *spare], np.int64)
    assert isinstance(new, Sequence) and isinstance(old, Sequence)
    position = {label: number for number, label in enumerate(old)}
    return np.array([position.get(label, -1) for label in new], np.int64)


def _rows_of_bins(new: Bins, old: Bins) -> np.ndarray:
    """For each row of bins the old row of its value: of a bin, the one in its middle; of a soft one, its point."""
    source = np.full(new.num_rows, -1, np.int64)
    source[0] = 0
    here, there = np.array(new.points), np.array(old.points)
    if not len(here) or not len(there):
        return source
    if new.is_soft:
        nearest = np.abs(here[:, None] - there).argmin(1)
        source[1 : 1 + len(here)] = 1 + nearest
    else:
        middle = np.concatenate([[-np.inf], (here[1:] + here[:-1]) / 2, [np.inf]])
        source[1 : 2 + len(here)] = 1 + np.searchsorted(there, middle, side="right")
    return source


def _sizes(new: Weight, old: Weight) -> str:
    return f"{shown_size(old.size)} there, {shown_size(new.size)} here"


def shown_size(size: Sequence[int]) -> str:
    """A tensor's size for people: 1,000 x 64."""
    return " x ".join(f"{length:,}" for length in size) or "one number"


# ------------------------------------------------------------ the transfer itself


def begin_with(model: nn.Module, meaning: Meaning, run: Run, ranks: Any) -> Report:
    """Give a model the weights of the best checkpoint of `run` that mean the same; all ranks call together.

    `meaning` is that of the model's own run. Raises ConfigError where no weight fits.
    """
    others = Checkpoints(run.folder / "checkpoints", ranks)
    path = ranks.once(lambda: others.choose("best"))
    reader = others.open(path)
    live = model.state_dict()
    here = meaning.layout({name: whole_size(value) for name, value in live.items()})
    sizes = {name.removeprefix(MODEL): tuple(size) for name, size in reader.sizes.items() if name.startswith(MODEL)}
    there = ranks.once(lambda: Meaning.of_saved(run)).layout(sizes)
    plan = transfers(here, there)
    report = Report.of(plan, there, path, reader.sealed.manifest["step"])
    if all(each.reason for each in plan):
        raise ConfigError(f"{path} has no weight that fits this model:\n{report.text}")
    wanted: dict[str, Any] = {}
    mapped: list[tuple[Transfer, Tensor]] = []
    for each in plan:
        if each.old is None or each.reason:
            continue
        if each.is_whole:
            wanted[MODEL + each.old.name] = live[each.new.name]
        else:
            wanted[MODEL + each.old.name] = value = torch.empty(each.old.size)
            mapped.append((each, value))
    others.fill(wanted, reader)
    for each, value in mapped:
        _map(live[each.new.name], value, each.sources)
    model.load_state_dict(live)
    for module in model.modules():
        if isinstance(module, Tower) and not any(key[0] == "average" for key in there):
            module.begin_average()
    return report


def _map(live: Any, value: Tensor, sources: Sequence[np.ndarray | None]) -> None:
    """Put the parts of an old tensor that have a place into a new one, or into this rank's shards of it."""
    if hasattr(live, "local_shards"):
        pieces = [(shard.tensor, tuple(shard.metadata.shard_offsets)) for shard in live.local_shards()]
    else:
        pieces = [(live, (0,) * live.dim())]
    for piece, first in pieces:
        part, places = value, []
        for axis, (source, start, length) in enumerate(zip(sources, first, piece.shape, strict=True)):
            here = np.arange(start, start + length) if source is None else source[start : start + length]
            places.append(torch.from_numpy(np.flatnonzero(here >= 0)))
            part = part.index_select(axis, torch.from_numpy(here[here >= 0]))
        with torch.no_grad():
            grid = torch.meshgrid(*(place.to(piece.device) for place in places), indexing="ij")
            piece[grid] = part.to(piece)


@dataclass(frozen=True)
class Report:
    """What was copied, mapped and skipped, line by line."""

    path: Path
    step: int
    copied: list[str]
    mapped: list[str]
    skipped: list[str]

    @classmethod
    def of(cls, plan: Sequence[Transfer], old: Layout, path: Path, step: int) -> Report:
        shown = [each for each in plan if not each.new.label.endswith((", averaged", "(bias)"))]
        copied = [each.new.label for each in shown if each.is_whole]
        mapped = [f"{each.new.label}: {_how(each)}" for each in shown if not each.reason and not each.is_whole]
        skipped = [f"{each.new.label}: {each.reason}" for each in plan if each.reason]
        taken = {each.old.name for each in plan if each.old is not None}
        lost = [weight.label for weight in old.values() if weight.name not in taken]
        skipped += [f"{label}: only in that run" for label in lost if not label.endswith(", averaged")]
        return cls(path, step, *(list(dict.fromkeys(lines)) for lines in (copied, mapped, skipped)))

    @property
    def text(self) -> str:
        """The report as a block to read."""
        lines = [f"began with the weights of {self.path} (step {self.step:,})"]
        for what, entries in (("copied", self.copied), ("mapped", self.mapped), ("skipped", self.skipped)):
            if what == "copied" and entries:
                entries = [", ".join(entries)]
            lines += [f"  {what if not number else '':<8} {entry}" for number, entry in enumerate(entries)]
        return "\n".join(lines)

    @property
    def facts(self) -> dict[str, Any]:
        """The report as values, for the run's log."""
        found = {name: getattr(self, name) for name in ("copied", "mapped", "skipped")}
        return {"checkpoint": str(self.path), "of_step": self.step, **found}


def _how(transfer: Transfer) -> str:
    """Which rows and columns of a weight come from which."""
    assert transfer.old is not None
    parts = []
    for new, old, source in zip(transfer.new.axes, transfer.old.axes, transfer.sources, strict=True):
        if source is None:
            continue
        if isinstance(new, Bins):
            parts.append(f"{int((source >= 0).sum()):,} rows of bins by value")
        elif isinstance(new, Words) and isinstance(old, Words):
            known, added, gone = _compared(new.words, old.words)
            parts.append(f"{len(known):,} words" + _listed(added, "; new: ") + _listed(gone, "; gone: "))
        elif isinstance(new, range):
            parts.append(f"the {int((source >= 0).sum()):,} newest steps")
        elif isinstance(new, Sequence) and isinstance(old, Sequence):
            known, added, gone = _compared([_feature(label) for label in new], [_feature(label) for label in old])
            parts.append(f"by feature: {_listed(known)}" + _listed(added, "; new: ") + _listed(gone, "; gone: "))
    return "; ".join(dict.fromkeys(parts))


def _compared(new: Sequence[Hashable], old: Sequence[Hashable]) -> tuple[list[str], list[str], list[str]]:
    """The names in both, in the new one alone, and in the old one alone."""
    here, there = dict.fromkeys(new), dict.fromkeys(old)
    known = [str(each) for each in here if each in there]
    return known, [str(each) for each in here if each not in there], [str(each) for each in there if each not in here]


def _feature(label: Hashable) -> str:
    """The feature that a column or a gate belongs to."""
    if isinstance(label, frozenset):
        return "numbers"
    return label[0] if isinstance(label, tuple) else str(label)


def _listed(names: Sequence[str], before: str = "") -> str:
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return before + ", ".join(names[:MOST_NAMES]) + more if names else ""
