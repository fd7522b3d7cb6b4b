"""Features and tables, as words: what a config declares once and every stage reads. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from trec_twotower.errors import ConfigError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

Side = Literal["user", "item"]
Kind = Literal["id", "category", "number", "bag"]
Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching"]
ShardingKind = Literal["auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class Settings(BaseModel):
    """The base of every group of settings: frozen; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TableSpec(Settings):
    """One embedding table, which any number of features may share."""

    buckets: PositiveInt  # rows; ids are hashed into them
    dim: PositiveInt  # columns
    sharding: ShardingKind = "auto"  # auto: the planner chooses
    shard_columns: PositiveInt | None = None  # column_wise: of each shard; default: dim / ranks or a little more
    # On GPU: fused_uvm keeps the table in host memory, fused_uvm_caching with a cache of it on the GPU.
    kernel: Kernel = "fused"
    cache_share: float | None = Field(default=None, gt=0, lt=1)  # of its rows, with fused_uvm_caching; default: 0.2
    dtype: Literal["fp32", "fp16"] = "fp32"  # of the weights; pooled sums, gradients and states stay fp32
    hashing: Literal["mix", "modulo"] = "mix"  # modulo: ids 0..buckets-1 keep a row each, without collisions
    seed: Seed = 0  # of the hash
    init_scale: PositiveFloat | None = None  # weights start uniform in ±init_scale; default 1 / sqrt(dim)

    @property
    def start_scale(self) -> float:
        return self.init_scale if self.init_scale is not None else self.dim**-0.5

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        return 2 if self.dtype == "fp16" else 4

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.cache_share is not None and self.kernel != "fused_uvm_caching":
            raise ValueError(
                f"cache_share is {self.cache_share:g}, but kernel {self.kernel} has no cache: leave it out, or set "
                "kernel: fused_uvm_caching."
            )
        if self.shard_columns is not None and (
            self.sharding != "column_wise" or self.shard_columns % 4 or self.dim % self.shard_columns
        ):
            raise ValueError(
                f"shard_columns is {self.shard_columns} with sharding {self.sharding} and dim {self.dim}: it belongs "
                "to column_wise, and must be a multiple of 4 that divides dim."
            )
        if self.sharding == "data_parallel" and (self.kernel != "fused" or self.dtype != "fp32"):
            raise ValueError(
                f"sharding data_parallel keeps a whole fp32 table on every rank, without fused kernel; kernel "
                f"{self.kernel} and dtype {self.dtype} need another sharding."
            )
        return self


class FeatureSpec(Settings):
    """One input of a tower: which column it reads and what is made of it.

    id        one int64 or string a row, never null
    category  one int64 or string a row; null has a table row of its own
    bag       a list of ids a row, pooled; null and empty lists are the zero vector, null elements are dropped
    number    one number a row, normalised, beside an indicator that is 1 where it is null
    """

    name: str = Field(min_length=1)
    kind: Kind
    column: str | None = None  # default: the feature's name
    table: str | None = None  # a table declared under `tables`, to share it
    buckets: PositiveInt | None = None  # or a table of its own, with so many rows ...
    dim: PositiveInt | None = None  # ... and columns
    max_length: PositiveInt | None = None  # bag: the newest (last) so many elements count
    pooling: Literal["sum", "mean", "sqrtn"] = "mean"  # bag
    weights: str | None = None  # bag: a column of lists, as long as the ids' lists
    normalise: Literal["zscore", "minmax", "log1p", "none"] = "zscore"  # number
    nan: Literal["error", "missing"] = "error"  # number: whether NaN and infinity may stand for null

    @property
    def reads(self) -> str:
        return self.column or self.name

    @property
    def is_sparse(self) -> bool:
        return self.kind != "number"

    @property
    def table_name(self) -> str:
        """The table this feature looks up; its own is named after it."""
        return self.table or self.name

    def hash(self, array: pa.Array, table: TableSpec | None = None) -> pa.Array:
        """The table rows that training looks up for a column: integers, or lists of them for a bag.

        For offline jobs (Spark, Ray, DuckDB), which need neither torch nor a run. `table` is the spec under `tables`
        where the feature names one. Null elements of a bag are dropped and long ones cut, as in training; raises
        DataError where the column does not fit the kind.
        """
        import pyarrow as pa

        from trec_twotower.data.transforms import check_kind, transform

        if not self.is_sparse:
            raise ConfigError(f"feature {self.name!r} is a number, which looks up no table: there is nothing to hash.")
        if (table is None) != (self.table is None):
            wanted = f"names table {self.table!r}: give its" if self.table else "has a table of its own: give no"
            raise ConfigError(f"feature {self.name!r} {wanted} TableSpec.")
        if table is None:
            assert self.buckets is not None and self.dim is not None
            table = TableSpec(buckets=self.buckets, dim=self.dim)
        where = f"the column given for feature {self.name!r}"
        check_kind(self, array.type, where)
        rows = pa.table({self.reads: array})
        lists = transform([self.model_copy(update={"weights": None})], {self.table_name: table}, {}, rows, where)
        found = lists.sparse[self.name]
        if found.is_single:
            return pa.array(found.values)
        return pa.LargeListArray.from_arrays(pa.array(found.offsets), pa.array(found.values))

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        own = self.buckets is not None or self.dim is not None
        if self.kind == "number":
            given = [
                key for key in ("table", "buckets", "dim", "max_length", "weights") if getattr(self, key) is not None
            ]
            if given:
                raise ValueError(f"feature {self.name!r} is a number, which has no {', '.join(given)}: remove that.")
        elif self.table is not None and own:
            raise ValueError(
                f"feature {self.name!r} names table {self.table!r} and also gives buckets or dim: "
                f"keep `table` and set the size under tables.{self.table}, or drop `table`."
            )
        elif self.table is None and (self.buckets is None or self.dim is None):
            raise ValueError(
                f"feature {self.name!r} needs `table` (one declared under tables), or both `buckets` and `dim`."
            )
        if self.kind != "bag" and (self.max_length is not None or self.weights is not None):
            raise ValueError(f"feature {self.name!r} is of kind {self.kind!r}; max_length and weights belong to a bag.")
        return self


@dataclass(frozen=True)
class Schema:
    """All features of both towers, and the tables they look up, names resolved."""

    tables: Mapping[str, TableSpec]
    user: tuple[FeatureSpec, ...]
    item: tuple[FeatureSpec, ...]

    @classmethod
    def build(
        cls, tables: Mapping[str, TableSpec], user: tuple[FeatureSpec, ...], item: tuple[FeatureSpec, ...]
    ) -> Schema:
        """Give every feature its table; raises ConfigError where names or sizes clash."""
        resolved = dict(tables)
        for side, features in (("user", user), ("item", item)):
            if not features:
                raise ConfigError(f"The {side} tower has no features: list at least one under `{side}`.")
            names = [feature.name for feature in features]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"Two {side} features are named {name!r}: give one another name (and `column`).")
            for feature in features:
                if not feature.is_sparse:
                    continue
                if feature.table is not None:
                    if feature.table not in tables:
                        raise ConfigError(
                            f"{side} feature {feature.name!r} looks up table {feature.table!r}, which is not under "
                            f"`tables`{nearest(feature.table, tables)}: declare it, or give buckets and dim."
                        )
                    continue
                assert feature.buckets is not None and feature.dim is not None
                if feature.name in resolved:
                    raise ConfigError(
                        f"{side} feature {feature.name!r} would make a table {feature.name!r}, which exists already: "
                        f"share it with table: {feature.name}, or rename the feature (and set `column`)."
                    )
                resolved[feature.name] = TableSpec(buckets=feature.buckets, dim=feature.dim)
        used = {feature.table_name for feature in (*user, *item) if feature.is_sparse}
        idle = [name for name in resolved if name not in used]
        if idle:
            raise ConfigError(f"Table {idle[0]!r} is declared under `tables` but no feature looks it up: remove it.")
        return cls(resolved, user, item)

    def features(self, side: Side) -> tuple[FeatureSpec, ...]:
        return self.user if side == "user" else self.item

    def sparse(self, side: Side) -> list[FeatureSpec]:
        """The features that look up a table, in the order of their keys."""
        return [feature for feature in self.features(side) if feature.is_sparse]

    def numbers(self, side: Side) -> list[FeatureSpec]:
        return [feature for feature in self.features(side) if not feature.is_sparse]

    def keys(self) -> list[str]:
        """The keys of every KeyedJaggedTensor of this schema, in their one order (user first)."""
        return [key(side, feature) for side, feature in self.sparse_pairs]

    @cached_property
    def sparse_pairs(self) -> tuple[tuple[Side, FeatureSpec], ...]:
        """Every feature that looks up a table with its side, in the order of the keys."""
        users: list[tuple[Side, FeatureSpec]] = [("user", feature) for feature in self.sparse("user")]
        return *users, *(("item", feature) for feature in self.sparse("item"))

    def table_of(self, feature: FeatureSpec) -> TableSpec:
        return self.tables[feature.table_name]

    def width(self, side: Side) -> int:
        """E: how many numbers enter the tower (pooled bags, then two per number)."""
        return sum(self.table_of(feature).dim for feature in self.sparse(side)) + 2 * len(self.numbers(side))

    @cached_property
    def is_weighted(self) -> bool:
        return any(feature.weights is not None for feature in (*self.user, *self.item))


def key(side: Side, feature: FeatureSpec) -> str:
    """A feature's key in the KeyedJaggedTensor; the side keeps two features of one name apart."""
    return f"{side}:{feature.name}"
