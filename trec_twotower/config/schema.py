"""The features of both towers with their tables resolved, and their order in batches and tower inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from trec_twotower.config.base import Side
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import SequenceFeature
from trec_twotower.config.model import TableSpec
from trec_twotower.errors import ConfigError, nearest

ROW_ALIGNMENT = 4  # fbgemm's kernels read table rows in multiples of this many numbers
_RESERVED = """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double
    dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu
    items keys load_state_dict modules mtia named_buffers named_children named_modules named_parameters
    parameters pop register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook
    register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory state_dict to
    to_empty train training type update values xpu zero_grad
"""
RESERVED_NAMES = frozenset(_RESERVED.split())  # attributes of torch's ModuleDict, which holds the tables by name


def lookup_key(side: Side, feature: FeatureSpec) -> str:
    """Return a feature's key in KeyedJaggedTensors; the side separates two features of one name."""
    return f"{side}:{feature.name}"


def bucket_names(name: str, table: TableSpec) -> list[str]:
    """Return the names of a feature's buckets, one per hash of its table: `user_id` and `user_id@2`."""
    return [name, sub_name(name, "2")][: table.hashes]


def sub_name(name: str, part: str) -> str:
    """Return the name or key of values next to those of a feature: `history@gap`."""
    return f"{name}@{part}"


def delta_key(key: str) -> str:
    """Return the key by which a sequence looks up its second table; no attribute's key equals it."""
    return f"{key}+delta"


@dataclass(frozen=True)
class Schema:
    """All features of both towers, and every table they look up."""

    tables: Mapping[str, TableSpec]
    user: tuple[FeatureSpec, ...]
    item: tuple[FeatureSpec, ...]

    @classmethod
    def build(
        cls, tables: Mapping[str, TableSpec], user: tuple[FeatureSpec, ...], item: tuple[FeatureSpec, ...]
    ) -> Schema:
        """Return the schema with the table of every feature; raises ConfigError if names or sizes conflict."""
        for side, features in (("user", user), ("item", item)):
            _check_names(side, features)
        schema = cls(_resolve_tables(tables, user, item), user, item)
        for name, spec in schema.tables.items():
            _check_table(name, spec, is_declared=name in tables)
        for feature in item:
            if isinstance(feature, SequenceFeature):
                raise ConfigError(f"item feature {feature.name!r} is a sequence, which is for users: make it a bag.")
        for feature in user:
            if feature.has_tokens:
                raise ConfigError(
                    f"user feature {feature.name!r} is text for a language model, which is for items: remove folder "
                    "and give buckets, or compute its vectors beforehand (kind vector)."
                )
        schema._check_sequences()
        return schema

    def features(self, side: Side) -> tuple[FeatureSpec, ...]:
        return self.user if side == "user" else self.item

    def table_of(self, feature: FeatureSpec) -> TableSpec:
        return self.tables[feature.table_name]

    @cached_property
    def layout(self) -> FeatureLayout:
        return FeatureLayout(self)

    @cached_property
    def sequences(self) -> tuple[SequenceFeature, ...]:
        return tuple(feature for feature in self.user if isinstance(feature, SequenceFeature))

    @cached_property
    def multi_interest_feature(self) -> SequenceFeature | None:
        """Return the sequence that makes several vectors per user; None if users have one vector."""
        return next((feature for feature in self.sequences if feature.encoder.num_vectors > 1), None)

    @property
    def vectors_per_user(self) -> int:
        return 1 if self.multi_interest_feature is None else self.multi_interest_feature.encoder.num_vectors

    @cached_property
    def unpooled_tables(self) -> frozenset[str]:
        """Return the tables that are looked up without pooling: those of sequences and their attributes."""
        attributes = {feature.name: feature.table_name for feature in self.item if feature.looks_up_table}
        names = set()
        for feature in self.sequences:
            names |= {feature.table_name, *(attributes[name] for name in feature.attributes)}
            names |= {feature.delta_table} if feature.delta_table else set()
        return frozenset(names)

    def _check_sequences(self) -> None:
        item_features = {feature.name: feature for feature in self.item}
        for feature in self.sequences:
            dim = self.table_of(feature).dim
            for name in feature.attributes:
                if name not in item_features or not item_features[name].looks_up_table:
                    reason = f"is not under `item`{nearest(name, item_features)}"
                    reason = "looks up no table" if name in item_features else reason
                    raise ConfigError(
                        f"user feature {feature.name!r} has the attribute {name!r}, which {reason}: name item features "
                        "that look up a table."
                    )
                if (other := self.table_of(item_features[name]).dim) != dim:
                    raise ConfigError(
                        f"user feature {feature.name!r} adds {name!r}, whose vectors have {other} numbers, to its own "
                        f"of {dim}: give both tables one dim."
                    )
            feature.encoder.check_width(dim, feature.name)
        several = [each.name for each in self.sequences if each.encoder.num_vectors > 1]
        if len(several) > 1:
            raise ConfigError(
                f"The user features {', '.join(several)} each make several vectors per user: keep one of them, and "
                "give the others an encoder without interests."
            )
        for name in sorted(self.unpooled_tables):
            if self.tables[name].hashes == 2:
                raise ConfigError(
                    f"Table {name!r} has hashes: 2, but a sequence looks it up, whose steps are one row each: set it "
                    "to 1, or give the other features a table of their own."
                )
            if self.tables[name].sharding in ("data_parallel", "table_row_wise"):
                raise ConfigError(
                    f"Table {name!r} is {self.tables[name].sharding}, but a sequence looks it up, for which torchrec "
                    "has table_wise, row_wise and column_wise: choose one of them, or auto."
                )


def _check_names(side: str, features: tuple[FeatureSpec, ...]) -> None:
    if not features:
        raise ConfigError(f"The {side} tower has no features: list at least one under `{side}`.")
    names = [feature.name for feature in features]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two {side} features are named {name!r}: rename one (and set `column`).")


def _resolve_tables(
    declared: Mapping[str, TableSpec], user: tuple[FeatureSpec, ...], item: tuple[FeatureSpec, ...]
) -> dict[str, TableSpec]:
    """Return the declared tables and the features' own tables."""
    tables = dict(declared)

    def add(side: str, feature: FeatureSpec, name: str, spec: TableSpec) -> None:
        if name in tables:
            raise ConfigError(
                f"{side} feature {feature.name!r} would make a table {name!r}, which exists already: share it with "
                f"table: {name}, or rename the feature (and set `column`)."
            )
        tables[name] = spec

    pairs = [*(("user", feature) for feature in user), *(("item", feature) for feature in item)]
    for side, feature in pairs:
        if feature.own_table is not None:
            add(side, feature, feature.name, feature.own_table)
        elif feature.shared_table is not None and feature.shared_table not in declared:
            raise ConfigError(
                f"{side} feature {feature.name!r} looks up table {feature.shared_table!r}, which is not under `tables`"
                f"{nearest(feature.shared_table, declared)}: declare it, or give buckets and dim."
            )
    used = {feature.table_name for _, feature in pairs if feature.looks_up_table}
    if unused := [name for name in tables if name not in used]:
        raise ConfigError(f"Table {unused[0]!r} is declared under `tables` but no feature looks it up: remove it.")
    for side, feature in pairs:
        if feature.delta_table is not None:
            spec = tables[feature.table_name].model_copy(update={"init_scale": 0.0})
            add(side, feature, feature.delta_table, spec)
    return tables


def _check_table(name: str, spec: TableSpec, *, is_declared: bool) -> None:
    """Raise ConfigError if torch or its kernels do not support a table of this name or size."""
    subject = f"Table {name!r}" if is_declared else f"Feature {name!r} has a table of its own, which"
    if spec.dim % ROW_ALIGNMENT and spec.sharding != "data_parallel":  # torch itself looks up data-parallel tables
        lower = spec.dim - spec.dim % ROW_ALIGNMENT
        choice = f"{lower} or {lower + ROW_ALIGNMENT}" if lower else f"{ROW_ALIGNMENT}"
        raise ConfigError(
            f"{subject} has dim {spec.dim}, but the kernels read a table's rows in steps of {ROW_ALIGNMENT} numbers: "
            f"set dim to {choice}."
        )
    if name in RESERVED_NAMES or "." in name or not name or name.startswith("_"):
        fix = "give it another name" if is_declared else f"rename the feature, and set column: {name}"
        raise ConfigError(
            f"{subject} cannot have that name, because torch keeps tables by name, without dots, next to attributes of "
            f"its own: {fix}."
        )


@dataclass(frozen=True)
class Lookup:
    """One key of the KeyedJaggedTensor of pooled tables."""

    key: str
    side: Side
    feature: FeatureSpec
    buckets: str  # name of its buckets in Columns.sparse


@dataclass(frozen=True)
class FeatureLayout:
    """The order of a schema's features in batches and tower inputs, and the keys by which they look up tables.

    A tower's input consists of parts: one per feature that looks up a table, one per feature with layers of its own,
    and the plain numbers together.
    """

    schema: Schema

    def table_features(self, side: Side) -> list[FeatureSpec]:
        """Return the features that look up a table."""
        return self._by_side[side][0]

    def layer_features(self, side: Side) -> list[FeatureSpec]:
        """Return the features with layers of their own."""
        return self._by_side[side][1]

    def plain_numbers(self, side: Side) -> list[FeatureSpec]:
        """Return the features that enter the tower unchanged."""
        return self._by_side[side][2]

    def float_features(self, side: Side) -> list[FeatureSpec]:
        """Return the features with float columns in a batch, in the order of the columns."""
        return self._by_side[side][3]

    @cached_property
    def _by_side(self) -> dict[Side, tuple[list[FeatureSpec], ...]]:
        by_side: dict[Side, tuple[list[FeatureSpec], ...]] = {}
        sides: tuple[Side, ...] = ("user", "item")
        for side in sides:
            features = self.schema.features(side)
            tables = [feature for feature in features if feature.looks_up_table]
            layers = [feature for feature in features if feature.has_layers]
            numbers = [each for each in features if not each.looks_up_table and not each.has_layers]
            by_side[side] = (tables, layers, numbers, [each for each in (*layers, *numbers) if each.num_numbers])
        return by_side

    @cached_property
    def table_pairs(self) -> tuple[tuple[Side, FeatureSpec], ...]:
        """Return every feature that looks up a table with its side, in the order of the keys: users first."""
        users: list[tuple[Side, FeatureSpec]] = [("user", feature) for feature in self.table_features("user")]
        return *users, *(("item", feature) for feature in self.table_features("item"))

    @cached_property
    def pooled_lookups(self) -> tuple[Lookup, ...]:
        """Return the lookups of pooled tables: one per feature and hash of its table."""
        return tuple(
            Lookup(f"{side}:{name}", side, feature, name)
            for side, feature in self.table_pairs
            if feature.table_name not in self.schema.unpooled_tables
            for name in bucket_names(feature.name, self.schema.table_of(feature))
        )

    @cached_property
    def pooled_keys(self) -> list[str]:
        """Return the keys of the KeyedJaggedTensor of pooled tables, in their order."""
        return [lookup.key for lookup in self.pooled_lookups]

    @cached_property
    def unpooled_keys(self) -> dict[str, str]:
        """Return the table of each key of the KeyedJaggedTensor of unpooled tables, in the order of the keys."""
        tables = {}
        attributes = {feature.name: feature.table_name for feature in self.schema.item}
        for side, feature in self.table_pairs:
            if feature.table_name not in self.schema.unpooled_tables:
                continue
            key = lookup_key(side, feature)
            tables[key] = feature.table_name
            if isinstance(feature, SequenceFeature):
                tables |= {sub_name(key, name): attributes[name] for name in feature.attributes}
                tables |= {delta_key(key): feature.delta_table} if feature.delta_table else {}
        return tables

    @cached_property
    def is_weighted(self) -> bool:
        """Return whether any feature has weights; then all pooled lookups do."""
        return any(feature.is_weighted for feature in (*self.schema.user, *self.schema.item))

    def part_widths(self, side: Side) -> tuple[int, ...]:
        """Return the width of each part of a tower's input."""
        numbers = sum(feature.num_numbers for feature in self.plain_numbers(side))
        tables = (self.schema.table_of(feature).dim for feature in self.table_features(side))
        layers = (feature.layers_width or 0 for feature in self.layer_features(side))
        return *tables, *layers, *([numbers] if numbers else [])

    def part_names(self, side: Side) -> list[str]:
        """Return the feature of each part; the first plain number represents all."""
        features = (*self.table_features(side), *self.layer_features(side), *self.plain_numbers(side)[:1])
        return [feature.name for feature in features]

    def part_index(self, side: Side, name: str) -> int:
        """Return the part that a feature is in."""
        names = self.part_names(side)
        return names.index(name) if name in names else len(names) - 1

    def input_width(self, side: Side) -> int:
        """Return the width E of a tower's input."""
        return sum(self.part_widths(side))
