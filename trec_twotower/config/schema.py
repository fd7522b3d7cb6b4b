"""Features and tables, as words: what a config declares once and every stage reads. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from trec_twotower.errors import ConfigError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

Side = Literal["user", "item"]
Kind = Literal["id", "category", "number", "bag", "cross", "time", "sequence", "text", "vector"]
Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching"]
HISTORY = "history"  # the column of what a user took before
Pooling = Literal["sum", "mean", "sqrtn"]
ShardingKind = Literal["auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
_OF_TABLES = ("table", "buckets", "dim", "hashes")
# What a feature may say beside name, kind and column, by its kind.
SETTINGS: dict[Kind, frozenset[str]] = {
    "id": frozenset({*_OF_TABLES, "scale"}),
    "category": frozenset({*_OF_TABLES, "scale", "vocabulary", "min_count"}),
    "bag": frozenset(
        {*_OF_TABLES, "scale", "max_length", "pooling", "weights", "times", "unit", "until", "half_life_days"}
    ),
    "text": frozenset({*_OF_TABLES, "scale", "max_length", "pooling", "words", "characters", "folder", "tune"}),
    "vector": frozenset({"size", "dim", "unit_length", "nan"}),
    "sequence": frozenset(
        {
            "table",
            "buckets",
            "dim",
            "max_length",
            "encoder",
            "times",
            "unit",
            "actions",
            "action_buckets",
            "attributes",
            "delta",
        }
    ),
    "number": frozenset({"dim", "normalise", "nan", "clip", "bins", "soft", "default", "frequencies"}),
    "cross": frozenset({*_OF_TABLES, "scale", "columns"}),
    "time": frozenset(
        {"dim", "part", "zone", "unit", "until", "at", "normalise", "clip", "bins", "soft", "frequencies"}
    ),
}
LEARNED = "learned"  # as a vocabulary
MAX_WORDS = 500_000  # of a vocabulary: it is read with the run
ROW_STEP = 4  # numbers: fbgemm's kernels read a table's rows in these
# Names that torch's ModuleDict, which holds the tables by name, has for itself.
_TAKEN = """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double
    dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu
    items keys load_state_dict modules mtia named_buffers named_children named_modules named_parameters
    parameters pop register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook
    register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory state_dict to
    to_empty train training type update values xpu zero_grad
"""
TAKEN = frozenset(_TAKEN.split())
TIME_PARTS = {"hour": 24, "weekday": 7, "hour_of_week": 168, "month": 12}  # and how many values each has


class Settings(BaseModel):
    """The base of every group of settings: frozen; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def auto_dim(buckets: int) -> int:
    """How many columns `dim: auto` gives a table: 6 * buckets ** 1/4 (Wang et al. 2017), rounded up to fours."""
    return 4 * -(-int(6 * buckets**0.25) // 4)


def _with_dim(values: Any) -> Any:
    """Settings whose `dim: auto` has become a number, where their buckets are known."""
    if not isinstance(values, dict) or values.get("dim") != "auto":
        return values
    buckets = values.get("buckets")
    if not isinstance(buckets, int) or buckets < 1:
        raise ValueError("dim: auto goes by `buckets`, which are not given beside it: write the dim itself.")
    return {**values, "dim": auto_dim(buckets)}


class TableSpec(Settings):
    """One embedding table, which any number of features may share."""

    buckets: int = Field(ge=1, le=1 << 32)  # rows; ids are hashed into them
    dim: PositiveInt  # columns, a multiple of 4 (but of data_parallel); auto: by auto_dim
    hashes: Literal[1, 2] = 1  # 2: an id is the sum of two rows that two hashes choose, so that few ids share both
    sharding: ShardingKind = "auto"  # auto: the planner chooses; row_wise on CPUs of one machine
    shard_columns: PositiveInt | None = None  # column_wise: of each shard; default: dim / ranks or a little more
    # On GPU: fused_uvm keeps the table in host memory, fused_uvm_caching with a cache of it on the GPU.
    kernel: Kernel = "fused"
    cache_share: float | None = Field(default=None, gt=0, lt=1)  # of its rows, with fused_uvm_caching; default: 0.2
    dtype: Literal["fp32", "fp16"] = "fp32"  # of the weights; pooled sums, gradients and states stay fp32
    hashing: Literal["mix", "modulo"] = "mix"  # modulo: ids 0..buckets-1 keep a row each, without collisions
    seed: Seed = 0  # of the hash
    init_scale: NonNegativeFloat | None = None  # weights start uniform in ±init_scale; default 1 / sqrt(dim)

    @property
    def start_scale(self) -> float:
        return self.init_scale if self.init_scale is not None else self.dim**-0.5

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        return 2 if self.dtype == "fp16" else 4

    @model_validator(mode="before")
    @classmethod
    def _sizes_by_rule(cls, values: Any) -> Any:
        return _with_dim(values)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.hashes == 2 and self.hashing == "modulo":
            raise ValueError("hashes is 2 with hashing: modulo, which gives every id a row of its own: leave one out.")
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


# What each encoder can be told, and the values it has where a config says nothing.
ENCODER_PARAMETERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "heads": {"heads": 8, "fastest": 1.5, "slowest": 0.02},
    "gru": {"layers": 1},
    "cnn": {"layers": 2, "width": 3},
    "transformer": {"layers": 1, "heads": 2, "positions": "learned", "causal": True},
    "attention": {"heads": 4},
    "hierarchical": {"segment": 8, "over": "gru"},
    "routing": {"interests": 4, "iterations": 3},
    "self_attention": {"interests": 4},
}


class EncoderSpec(Settings):
    """What makes one vector of a sequence's steps; see model/sequence.py."""

    kind: Literal[
        "mean", "heads", "gru", "cnn", "transformer", "attention", "hierarchical", "routing", "self_attention"
    ] = "mean"
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of each number of each step's vector, in training
    # One of ENCODER_PARAMETERS each; null where the encoder has no such parameter.
    heads: PositiveInt | None = None  # parts of the vector, each with weights or attention of its own
    fastest: PositiveFloat | None = None  # heads: what the first one's log weights lose a step at the start ...
    slowest: PositiveFloat | None = None  # ... and the last one's, those between in equal ratios
    layers: PositiveInt | None = None
    width: PositiveInt | None = None  # cnn: steps that a filter sees, the newest of them its own
    positions: Literal["learned", "rotary"] | None = None  # transformer: counted from the newest step
    causal: bool | None = None  # transformer: a step sees those before it alone, and the newest is the result
    segment: PositiveInt | None = None  # hierarchical: steps that are taken together
    over: Literal["gru", "transformer"] | None = None  # hierarchical: what reads the segments
    interests: int | None = Field(default=None, ge=2)  # routing, self_attention: vectors of each user
    iterations: PositiveInt | None = None  # routing: how often steps choose among the interests

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        known = ENCODER_PARAMETERS.get(str(values.get("kind", "mean"))) if isinstance(values, dict) else None
        if known is None:
            return values  # whose kind is then refused
        return {**values, **{name: value for name, value in known.items() if values.get(name) is None}}

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        for name in sorted({name for parameters in ENCODER_PARAMETERS.values() for name in parameters}):
            if name not in ENCODER_PARAMETERS[self.kind] and getattr(self, name) is not None:
                others = ", ".join(kind for kind, parameters in ENCODER_PARAMETERS.items() if name in parameters)
                raise ValueError(
                    f"encoder.{name} is set, but encoder.kind {self.kind} has no {name} (it belongs to {others}): "
                    "leave it out, or choose another kind."
                )
        return self


class FeatureSpec(Settings):
    """One input of a tower: which column it reads and what is made of it.

    id        one int64 or string a row, never null
    category  one int64 or string a row; null has a table row of its own
    bag       a list of ids a row, pooled; null and empty lists are the zero vector, null elements are dropped
    number    one number a row, clipped and normalised, beside an indicator that is 1 where it is null; with `bins`
              a row of a table for each bin and one for null
    cross     what two or three columns of ids or categories say together; null is a value like others
    time      the hour, weekday, hour of the week or month of a point in time, with a row of a table each and one for
              null; or its age in days, a number like others
    text      a string a row: its words and parts of words, hashed and pooled like a bag; or, with `folder`, what a
              language model makes of it, trained with the towers or not
    vector    a list of `size` numbers a row, made elsewhere; null has a learned vector of its own
    sequence  a list of ids a row, oldest first, whose order counts; of users only, and `encoder` makes its vector.
              A step's vector is its row of the table, and what is named of these: the gap since the step before it,
              the action taken, the step's item's own features in the catalogue, and a table of differences
    """

    name: str = Field(min_length=1)
    kind: Kind
    column: str | None = None  # default: the feature's name
    table: str | None = None  # a table declared under `tables`, to share it
    buckets: int | None = Field(default=None, ge=1, le=1 << 32)  # or a table of its own, with so many rows ...
    # ... and columns, of a table a multiple of 4; auto: by auto_dim
    dim: PositiveInt | None = None
    hashes: Literal[1, 2] = 1  # of a table of its own, see TableSpec
    vocabulary: str | None = None  # category: a file of one word a line, or `learned` of the data; not hashed then
    min_count: PositiveInt = 1  # category, learned: what stands in fewer rows is unknown
    # bag, sequence: the newest (last) so many elements count; text: the first so many words, or tokens.
    max_length: PositiveInt | None = None
    pooling: Pooling = "mean"  # bag, text
    weights: str | None = None  # bag: a column of lists, as long as the ids' lists
    half_life_days: PositiveFloat | None = None  # bag: after which an element of `times` weighs half
    words: NonNegativeInt = 1  # text: runs of up to so many words; 0: no words
    characters: tuple[PositiveInt, PositiveInt] | None = None  # text: least and most characters of a word's parts
    folder: str | None = None  # text: of a Hugging Face model, whose vectors stand for the text
    tune: Literal["frozen", "all"] | PositiveInt = "frozen"  # text: how many of its last layers are trained
    size: PositiveInt | None = None  # vector: how many numbers a row's list holds
    unit_length: bool = False  # vector: divided by its length
    normalise: Literal["zscore", "minmax", "log1p", "quantile", "none"] = "zscore"  # number
    default: float | None = None  # number: what stands for null, before it is normalised; default: 0 behind that
    frequencies: PositiveInt | None = None  # number: its waves of so many learned frequencies, then a layer to `dim`
    nan: Literal["error", "missing"] = "error"  # number, vector: whether NaN and infinity may stand for null
    clip: tuple[float | None, float | None] | None = None  # number: least and most, or null; before all else
    # number: so many bins of equal count, or the values at which a new bin begins; each has a row of `dim`.
    bins: Annotated[int, Field(ge=2, le=10_000)] | tuple[float, ...] | None = None
    soft: bool = False  # number: between two bins' values the row of each, in proportion, so that near is alike
    columns: tuple[str, ...] | None = None  # cross: two or three, all of one side's rows
    part: Literal["hour", "weekday", "hour_of_week", "month", "age"] | None = None  # time
    zone: str = "UTC"  # time: in which the part is told, such as Europe/Oslo
    # time, and `times` of a bag or a sequence: the unit of plain numbers, which count from 1970 on.
    unit: Literal["s", "ms", "us", "ns"] = "s"
    # time, age: the column with the time at which the age is asked for; bag: at which `times` are looked back on.
    until: str | None = None
    at: Annotated[str, BeforeValidator(str)] | None = None  # time, age: or one date for all rows, such as 2023-06-30
    scale: PositiveFloat = 1.0  # id, category, bag: what its vector is multiplied by
    encoder: EncoderSpec | None = None  # sequence; default: the mean
    times: str | None = None  # sequence, bag: a column of lists as long, of rising seconds or timestamps
    actions: str | None = None  # sequence: a column of lists as long, of what was done: integers or strings ...
    action_buckets: int = Field(default=64, ge=1, le=1 << 32)  # ... hashed into so many
    attributes: tuple[str, ...] = ()  # sequence: item features that are added to each step's vector
    delta: bool = False  # sequence: a second table, which starts at zero, is added to its table's vectors

    @property
    def delta_table(self) -> str:
        return f"{self.name}_delta"

    @property
    def encoding(self) -> EncoderSpec:
        return self.encoder or EncoderSpec()

    @property
    def reads(self) -> str:
        return self.columns[0] if self.columns else self.column or self.name

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Every column that the feature reads, `reads` first."""
        named = (self.reads, *(self.columns or ()), self.weights, self.until, self.times, self.actions)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def is_numeric(self) -> bool:
        """Whether it makes a number of each row, to be normalised or binned."""
        return self.kind == "number" or (self.kind == "time" and self.part == "age")

    @property
    def is_tokens(self) -> bool:
        """Whether a language model reads it."""
        return self.folder is not None

    @property
    def has_layers(self) -> bool:
        """Whether layers of its own, and no table, make of it what enters the tower."""
        return self.kind == "vector" or self.frequencies is not None or self.is_tokens

    @property
    def is_sparse(self) -> bool:
        """Whether it looks up a table; the others enter the tower as they are, or by layers of their own."""
        return not self.has_layers and (not self.is_numeric or self.bins is not None)

    @property
    def is_list(self) -> bool:
        """Whether a row may hold any number of table rows."""
        return self.kind in ("bag", "sequence", "text") or self.soft

    @property
    def is_weighted(self) -> bool:
        """Whether its table rows come with weights."""
        return self.weights is not None or self.soft or self.half_life_days is not None

    @property
    def is_pooled(self) -> bool:
        """Whether `pooling` says what is made of its table rows."""
        return self.kind in ("bag", "text")

    @property
    def learns(self) -> bool:
        """Whether something is learned from the data before the first step, and kept with the run."""
        return self.is_numeric or self.vocabulary is not None

    @property
    def num_numbers(self) -> int:
        """How many numbers a batch holds of a feature without table: a value and its indicator, or a list's and it."""
        if self.is_sparse or self.is_tokens:
            return 0
        return 2 if self.size is None else self.size + 1

    @property
    def layers_width(self) -> int:
        """How many numbers enter the tower from a feature with layers of its own."""
        width = self.dim or self.size
        assert width is not None
        return width

    @property
    def table_name(self) -> str:
        """The table this feature looks up; its own is named after it."""
        return self.table or self.name

    @property
    def own_table(self) -> TableSpec:
        """The table of a feature that names none."""
        buckets = self.buckets
        if self.bins is not None:
            values = self.bins if isinstance(self.bins, int) else len(self.bins) + (not self.soft)
            buckets = values + 1  # the first is null's
        elif self.kind == "time":
            buckets = TIME_PARTS[str(self.part)] + 1
        assert buckets is not None and self.dim is not None
        return TableSpec(buckets=buckets, dim=self.dim, hashes=self.hashes)

    def hash(self, array: pa.Array, table: TableSpec | None = None) -> pa.Array:
        """The table rows that training looks up for a column: integers, or lists of them for a bag.

        For offline jobs (Spark, Ray, DuckDB), which need neither torch nor a run. `table` is the spec under `tables`
        where the feature names one. Null elements of a bag are dropped and long ones cut, as in training; raises
        DataError where the column does not fit the kind.
        """
        import pyarrow as pa

        from trec_twotower.data.arrow_types import plain_table
        from trec_twotower.data.features.transform import check_kind, transform

        if self.kind not in ("id", "category", "bag", "sequence", "text") or self.vocabulary or self.is_tokens:
            raise ConfigError(f"feature {self.name!r} is a {self.kind}, whose column is not hashed by itself.")
        if (table or self).hashes == 2:
            raise ConfigError(f"feature {self.name!r} has two rows an id, but this gives one: hashes must be 1 here.")
        if (table is None) != (self.table is None):
            wanted = f"names table {self.table!r}: give its" if self.table else "has a table of its own: give no"
            raise ConfigError(f"feature {self.name!r} {wanted} TableSpec.")
        where = f"the column given for feature {self.name!r}"
        rows = plain_table(pa.table({self.reads: array}), [self.reads])
        check_kind(self, rows.schema.types[0], where)
        tables = {self.table_name: table or self.own_table}
        alone = {"weights": None, "times": None, "half_life_days": None, "actions": None, "attributes": ()}
        found = transform([self.model_copy(update=alone)], tables, {}, rows, where).sparse[self.name]
        if found.is_single:
            return pa.array(found.values)
        return pa.LargeListArray.from_arrays(pa.array(found.offsets), pa.array(found.values))

    def check_words(self) -> None:
        """Raises ConfigError where a vocabulary's file cannot be read, or not into as many rows as there are."""
        if self.vocabulary not in (None, LEARNED):
            from trec_twotower.data.features.vocabulary import words_of_file

            words_of_file(self)

    @model_validator(mode="before")
    @classmethod
    def _sizes_by_rule(cls, values: Any) -> Any:
        """A vocabulary's file says how many buckets there are, and these what `dim: auto` is."""
        if isinstance(values, dict) and values.get("buckets") is None:
            path = values.get("vocabulary")
            if isinstance(path, str) and path != LEARNED:
                from trec_twotower.data.features.vocabulary import FIRST_WORD, read_words

                values = {**values, "buckets": len(read_words(path)) + FIRST_WORD}
        return _with_dim(values)

    @model_validator(mode="before")
    @classmethod
    def _tunes_a_part(cls, values: Any) -> Any:
        """`tune` is a word or a number, which pydantic's own messages cannot put plainly."""
        tune = values.get("tune", "frozen") if isinstance(values, dict) else "frozen"
        is_count = isinstance(tune, int) and not isinstance(tune, bool) and tune > 0
        if tune not in ("frozen", "all") and not is_count:
            raise ValueError(
                f"feature {values.get('name')!r} has tune: {tune}: say how many of the model's last layers are trained "
                "(1 or more), or all, or frozen (none)."
            )
        return values

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if "." in self.name:
            raise ValueError(
                f"feature {self.name!r} has a dot in its name, which settings and weights are told apart by: name it "
                f"{self.name.replace('.', '_')!r}, and set column: {self.reads}."
            )
        own = {"name", "kind"} | ({"column"} if self.kind != "cross" else set()) | SETTINGS[self.kind]
        given = [
            key
            for key, field in type(self).model_fields.items()
            if key not in own and getattr(self, key) != field.default
        ]
        if given:
            raise ValueError(
                f"feature {self.name!r} is of kind {self.kind!r}, which has no {', '.join(given)}: remove that."
            )
        if self.kind == "time":
            self._time_fits()
        if self.kind == "cross" and len(self.columns or ()) not in (2, 3):
            raise ValueError(f"feature {self.name!r} is a cross: name two or three `columns`.")
        for column in self.columns or ():
            if (self.columns or ()).count(column) > 1:
                raise ValueError(
                    f"feature {self.name!r} crosses the column {column!r} with itself, which says no more than that "
                    "column alone: name different ones, or make it a category."
                )
        if self.is_numeric:
            self._bins_fit()
        elif self.kind == "vector" or self.is_tokens:
            self._layers_fit()
        elif self.kind == "time":
            if self.dim is None:
                raise ValueError(f"feature {self.name!r} looks up a row for each {self.part}: give its `dim`.")
        elif self.table is not None and (self.buckets is not None or self.dim is not None):
            raise ValueError(
                f"feature {self.name!r} names table {self.table!r} and also gives buckets or dim: "
                f"keep `table` and set the size under tables.{self.table}, or drop `table`."
            )
        elif self.table is None and (self.buckets is None or self.dim is None):
            raise ValueError(
                f"feature {self.name!r} needs `table` (one declared under tables), or both `buckets` and `dim`."
            )
        self._bag_fits()
        self._words_fit()
        if self.kind in ("bag", "sequence") and self.unit != "s" and self.times is None:
            raise ValueError(f"feature {self.name!r} has unit: {self.unit}, but no `times`: remove it, or name them.")
        if self.kind == "sequence" and self.max_length is None:
            raise ValueError(f"feature {self.name!r} is a sequence and needs max_length: how many steps may count.")
        return self

    def _bag_fits(self) -> None:
        if self.kind == "bag" and (self.half_life_days is None) != (self.times is None):
            raise ValueError(
                f"feature {self.name!r} has times: {self.times} and half_life_days: {self.half_life_days}: a bag whose "
                "elements weigh less as they grow older needs both."
            )
        if self.kind == "bag" and self.until is not None and self.times is None:
            raise ValueError(f"feature {self.name!r} has until: {self.until}, but no `times` to look back on.")

    def _words_fit(self) -> None:
        if self.table is not None and (self.hashes == 2 or self.vocabulary is not None):
            found = "vocabulary" if self.vocabulary is not None else "hashes"
            raise ValueError(
                f"feature {self.name!r} shares table {self.table!r} and has {found}, which is a table's of its own: "
                "give buckets and dim, or (of hashes) set it under tables."
            )
        if self.vocabulary is None and self.min_count != 1:
            raise ValueError(f"feature {self.name!r} has min_count, which is for vocabulary: {LEARNED}: remove it.")
        if self.vocabulary is not None and (self.buckets or 0) > MAX_WORDS:
            raise ValueError(
                f"feature {self.name!r} has a vocabulary of {self.buckets:,} buckets, but a run keeps {MAX_WORDS:,} "
                "words at most: take fewer, or have them hashed (leave vocabulary out)."
            )
        if self.vocabulary is not None and (self.hashes == 2 or (self.buckets or 0) < 3):
            raise ValueError(
                f"feature {self.name!r} has a vocabulary: it needs 3 buckets or more (null, unknown and a word each "
                "have one) and hashes nothing."
            )
        if self.kind != "text" or self.is_tokens:
            return
        if self.tune != "frozen":
            raise ValueError(f"feature {self.name!r} has tune: {self.tune}, but no `folder` of a model: name one.")
        low, high = self.characters or (1, 1)
        if low > high or (not self.words and self.characters is None):
            raise ValueError(
                f"feature {self.name!r} has words: {self.words} and characters: {self.characters}: name one of them, "
                "of characters the least first."
            )

    def _layers_fit(self) -> None:
        if self.kind == "vector":
            if self.size is None:
                raise ValueError(f"feature {self.name!r} is a vector: say its `size`, and `dim` to have it projected.")
            return
        given = [name for name in ("table", "buckets", "characters") if getattr(self, name) is not None]
        if given or self.dim is None or self.hashes != 1 or self.words != 1 or self.pooling != "mean":
            raise ValueError(
                f"feature {self.name!r} is text that the model in {self.folder} reads: give the `dim` that its vectors "
                "are projected to, and none of table, buckets, hashes, words, characters and pooling."
            )
        from trec_twotower.data.features.text import check_folder

        check_folder(self)

    def _time_fits(self) -> None:
        if self.part is None:
            raise ValueError(f"feature {self.name!r} is a time: name its `part`: {', '.join(TIME_PARTS)} or age.")
        of_ages = ("normalise", "clip", "bins", "soft", "until", "at", "frequencies")
        given = [key for key in of_ages if getattr(self, key) != type(self).model_fields[key].default]
        if self.part != "age" and given:
            raise ValueError(
                f"feature {self.name!r} is the {self.part} of a time, which has no {', '.join(given)}: remove that."
            )
        if self.part == "age" and (self.until is None) == (self.at is None):
            raise ValueError(
                f"feature {self.name!r} is an age: name the column of the time at which it is asked for (`until`), or "
                "one date for all rows (`at`)."
            )
        if self.part == "age" and self.zone != "UTC":
            raise ValueError(f"feature {self.name!r} is an age, which is the same in every zone: remove zone.")
        if self.at is not None:
            try:
                datetime.fromisoformat(self.at)
            except ValueError:
                raise ValueError(f"feature {self.name!r} has at: {self.at}: write a date such as 2023-06-30.") from None
        if self.zone != "UTC":
            try:
                ZoneInfo(self.zone)
            except (ZoneInfoNotFoundError, ValueError, OSError):
                near = nearest(self.zone, available_timezones())
                raise ValueError(
                    f"feature {self.name!r} has zone {self.zone!r}, which is not known here{near}."
                ) from None

    def _bins_fit(self) -> None:
        low, high = self.clip or (None, None)
        if low is not None and high is not None and low >= high:
            raise ValueError(f"feature {self.name!r} has clip {[low, high]}: write the least first, then the most.")
        if self.frequencies is not None and (self.bins is not None or self.dim is None):
            raise ValueError(
                f"feature {self.name!r} has frequencies {self.frequencies}, bins {self.bins} and dim {self.dim}: waves "
                "need the `dim` of the layer behind them, and no bins."
            )
        if self.default is not None and self.bins is not None:
            raise ValueError(f"feature {self.name!r} has bins, of which null owns one: remove default.")
        is_plain = self.bins is None and self.frequencies is None
        if is_plain != (self.dim is None) or (self.bins is None and self.soft):
            raise ValueError(
                f"feature {self.name!r} has bins {self.bins}, dim {self.dim} and soft: {str(self.soft).lower()}: a "
                "number with `bins` looks up rows of `dim`, one without (and without `frequencies`) has neither."
            )
        if isinstance(self.bins, tuple):
            if not self.bins or any(one >= other for one, other in pairwise(self.bins)):
                raise ValueError(
                    f"feature {self.name!r} has bins {list(self.bins)}: write rising values, at least one."
                )
            if self.soft and len(self.bins) < 2:
                raise ValueError(f"feature {self.name!r} is soft between {list(self.bins)}: name two values or more.")
        if self.bins is not None and self.normalise != "zscore":
            raise ValueError(
                f"feature {self.name!r} has bins, to which normalise: {self.normalise} makes no difference: remove it."
            )


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
                if feature.name in resolved:
                    raise ConfigError(
                        f"{side} feature {feature.name!r} would make a table {feature.name!r}, which exists already: "
                        f"share it with table: {feature.name}, or rename the feature (and set `column`)."
                    )
                resolved[feature.name] = feature.own_table
        used = {feature.table_name for feature in (*user, *item) if feature.is_sparse}
        idle = [name for name in resolved if name not in used]
        if idle:
            raise ConfigError(f"Table {idle[0]!r} is declared under `tables` but no feature looks it up: remove it.")
        for feature in (*user, *item):
            if feature.delta:
                if feature.delta_table in resolved:
                    raise ConfigError(
                        f"user feature {feature.name!r} would make a table {feature.delta_table!r} for its delta, "
                        "which exists already: rename the feature (and set `column`)."
                    )
                of_ids = resolved[feature.table_name]
                resolved[feature.delta_table] = of_ids.model_copy(update={"init_scale": 0.0})
        cls._check_tables(resolved, tables)
        schema = cls(resolved, user, item)
        schema._check_sequences()
        return schema

    @staticmethod
    def _check_tables(resolved: Mapping[str, TableSpec], declared: Mapping[str, TableSpec]) -> None:
        """Raises ConfigError where torch or its kernels cannot hold a table of such a name or size."""
        for name, spec in resolved.items():
            is_own = name not in declared  # the table of a feature of this name
            if spec.dim % ROW_STEP and spec.sharding != "data_parallel":  # which torch itself looks up
                lower = spec.dim - spec.dim % ROW_STEP
                choice = f"{lower} or {lower + ROW_STEP}" if lower else f"{ROW_STEP}"
                raise ConfigError(
                    f"{f'Feature {name!r} has a table of its own with' if is_own else f'Table {name!r} has'} dim "
                    f"{spec.dim}, but the kernels read a table's rows in steps of {ROW_STEP} numbers: set dim to "
                    f"{choice}."
                )
            if name in TAKEN or "." in name or not name or name.startswith("_"):
                found = f"Feature {name!r} has a table of its own, which" if is_own else f"Table {name!r}"
                mend = f"rename the feature, and set column: {name}" if is_own else "give it another name"
                raise ConfigError(
                    f"{found} cannot have that name, because torch keeps tables by name, without dots, beside names of "
                    f"its own: {mend}."
                )

    def _check_sequences(self) -> None:
        """Raises ConfigError where a sequence, or what is added to its steps, cannot be looked up."""
        by_name = {feature.name: feature for feature in self.item}
        for feature in self.item:
            if feature.kind == "sequence":
                raise ConfigError(f"item feature {feature.name!r} is a sequence, which is for users: make it a bag.")
        for feature in self.user:
            if feature.is_tokens:
                raise ConfigError(
                    f"user feature {feature.name!r} is text read by a model, which is for items: leave folder out and "
                    "give buckets, or have its vectors made beforehand (kind vector)."
                )
        for feature in self.sequences:
            dim = self.table_of(feature).dim
            for name in feature.attributes:
                if name not in by_name or not by_name[name].is_sparse:
                    found = f"is none of `item`{nearest(name, by_name)}"
                    found = f"is a {by_name[name].kind}, without table" if name in by_name else found
                    raise ConfigError(
                        f"user feature {feature.name!r} has the attribute {name!r}, which {found}: name item features "
                        "that look up a table."
                    )
                if (other := self.table_of(by_name[name]).dim) != dim:
                    raise ConfigError(
                        f"user feature {feature.name!r} adds {name!r}, whose vectors have {other} numbers, to its own "
                        f"of {dim}: give both tables one dim."
                    )
            several = [each.name for each in self.sequences if each.encoding.interests]
            if len(several) > 1:
                raise ConfigError(
                    f"The user features {', '.join(several)} each make several vectors of a user: let one do so, and "
                    "give the others an encoder without interests."
                )
            heads = feature.encoding.heads
            if heads is not None and dim % heads:
                raise ConfigError(
                    f"user feature {feature.name!r} cuts vectors of {dim} numbers into {heads} heads: take a divisor."
                )
            if feature.encoding.positions == "rotary" and (dim // (heads or 1)) % 2:
                raise ConfigError(
                    f"user feature {feature.name!r} has positions: rotary, which turns numbers in pairs, but cuts "
                    f"vectors of {dim} numbers into {heads} heads of {dim // (heads or 1)}: choose heads that leave an "
                    "even number, or positions: learned."
                )
        for name in sorted(self.listed):
            if self.tables[name].hashes == 2:
                raise ConfigError(
                    f"Table {name!r} has hashes: 2, but a sequence looks it up, whose steps are one row each: set it "
                    "to 1, or give the others a table of their own."
                )
            if self.tables[name].sharding in ("data_parallel", "table_row_wise"):
                raise ConfigError(
                    f"Table {name!r} is {self.tables[name].sharding}, but a sequence looks it up, which torchrec has "
                    "for table_wise, row_wise and column_wise alone: choose one of them, or leave it to auto."
                )

    def features(self, side: Side) -> tuple[FeatureSpec, ...]:
        return self.user if side == "user" else self.item

    def sparse(self, side: Side) -> list[FeatureSpec]:
        """The features that look up a table, in the order of their keys."""
        return self._sides[side][0]

    def numbers(self, side: Side) -> list[FeatureSpec]:
        """The features that enter the tower as they are."""
        return self._sides[side][1]

    def layered(self, side: Side) -> list[FeatureSpec]:
        """The features with layers of their own."""
        return self._sides[side][2]

    def dense(self, side: Side) -> list[FeatureSpec]:
        """The features of whose rows a batch holds numbers, in their order there."""
        return self._sides[side][3]

    @cached_property
    def _sides(self) -> dict[Side, tuple[list[FeatureSpec], ...]]:
        """Of each side what `sparse`, `numbers`, `layered` and `dense` say: every step asks."""
        found: dict[Side, tuple[list[FeatureSpec], ...]] = {}
        sides: tuple[Side, ...] = ("user", "item")
        for side in sides:
            features = self.features(side)
            sparse = [feature for feature in features if feature.is_sparse]
            numbers = [feature for feature in features if not feature.is_sparse and not feature.has_layers]
            layered = [feature for feature in features if feature.has_layers]
            dense = [feature for feature in (*layered, *numbers) if feature.num_numbers]
            found[side] = (sparse, numbers, layered, dense)
        return found

    def keys(self) -> list[str]:
        """The keys of the bags' KeyedJaggedTensor, in their one order (user first)."""
        return [lookup.key for lookup in self.lookups]

    @cached_property
    def lookups(self) -> tuple[Lookup, ...]:
        """All that is looked up in bags: one a feature, or two side by side where its table has two hashes."""
        found = []
        for side, feature in self.sparse_pairs:
            if feature.table_name not in self.listed:
                for part in hash_parts(feature.name, self.table_of(feature)):
                    found.append(Lookup(f"{side}:{part}", side, feature, part))
        return tuple(found)

    @cached_property
    def listed(self) -> frozenset[str]:
        """The tables whose rows are wanted one by one: those that a sequence looks up, and all that look them up."""
        attributes = {feature.name: feature.table_name for feature in self.item if feature.is_sparse}
        names = set()
        for feature in self.sequences:
            names |= {feature.table_name, *(attributes[name] for name in feature.attributes if name in attributes)}
            names |= {feature.delta_table} if feature.delta else set()
        return frozenset(names)

    @cached_property
    def listed_keys(self) -> tuple[tuple[str, str], ...]:
        """The keys of the other KeyedJaggedTensor, of ids whose vectors are wanted one by one, each with its table."""
        found = []
        attributes = {feature.name: feature.table_name for feature in self.item}
        for side, feature in self.sparse_pairs:
            if feature.table_name not in self.listed:
                continue
            found.append((key(side, feature), feature.table_name))
            found += [(part_of(key(side, feature), name), attributes[name]) for name in feature.attributes]
            if feature.delta:
                found.append((part_of(key(side, feature), "delta", "+"), feature.delta_table))
        return tuple(found)

    @cached_property
    def sequences(self) -> tuple[FeatureSpec, ...]:
        return tuple(feature for feature in self.user if feature.kind == "sequence")

    @cached_property
    def several(self) -> FeatureSpec | None:
        """The sequence that makes several vectors of a user; None where a user is one vector."""
        return next((feature for feature in self.sequences if feature.encoding.interests), None)

    @property
    def vectors_per_user(self) -> int:
        """M."""
        return 1 if self.several is None else self.several.encoding.interests or 1

    @cached_property
    def sparse_pairs(self) -> tuple[tuple[Side, FeatureSpec], ...]:
        """Every feature that looks up a table with its side, in the order of the keys."""
        users: list[tuple[Side, FeatureSpec]] = [("user", feature) for feature in self.sparse("user")]
        return *users, *(("item", feature) for feature in self.sparse("item"))

    def table_of(self, feature: FeatureSpec) -> TableSpec:
        return self.tables[feature.table_name]

    def widths(self, side: Side) -> tuple[int, ...]:
        """How many numbers each feature brings into the tower, in their order there; plain numbers together."""
        numbers = sum(feature.num_numbers for feature in self.numbers(side))
        layered = (feature.layers_width for feature in self.layered(side))
        return *(self.table_of(feature).dim for feature in self.sparse(side)), *layered, *([numbers] if numbers else [])

    def parts(self, side: Side) -> list[str]:
        """The feature of each of `widths`; of numbers, the first stands for all."""
        numbers = self.numbers(side)
        return [feature.name for feature in (*self.sparse(side), *self.layered(side), *numbers[:1])]

    def place(self, side: Side, name: str) -> int:
        """Which of `widths` a feature is in."""
        names = self.parts(side)
        return names.index(name) if name in names else len(names) - 1

    def width(self, side: Side) -> int:
        """E: how many numbers enter the tower (pooled bags, then the features without table)."""
        return sum(self.widths(side))

    @cached_property
    def is_weighted(self) -> bool:
        return any(feature.is_weighted for feature in (*self.user, *self.item))


@dataclass(frozen=True)
class Lookup:
    """One key of the bags' KeyedJaggedTensor."""

    key: str
    side: Side
    feature: FeatureSpec
    part: str  # its name among Columns.sparse


def hash_parts(name: str, table: TableSpec) -> list[str]:
    """What a feature's buckets are named: of a table with two hashes, also those of the second."""
    return [name, part_of(name, "2")][: table.hashes]


def part_of(name: str, part: str, mark: str = "@") -> str:
    """What stands beside a sequence under its name or key: `history@gap`."""
    return f"{name}{mark}{part}"


def key(side: Side, feature: FeatureSpec) -> str:
    """A feature's key in the KeyedJaggedTensor; the side keeps two features of one name apart."""
    return f"{side}:{feature.name}"
