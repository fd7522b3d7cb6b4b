"""Every setting of the system: loaded from YAML, overridden by key=value, saved beside every artefact."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from trec_twotower.errors import ConfigError, nearest
from trec_twotower.schema import FeatureSpec, Schema, Seed, Settings, TableSpec

Model = TypeVar("Model", bound=BaseModel)


def _plain(place: Any) -> Any:
    return str(place) if isinstance(place, Path) else place


class DataConfig(Settings):
    """What is read, and in which order."""

    dataset: Annotated[str, BeforeValidator(_plain)]  # the folder that `prepare` wrote, or a URL that fsspec knows
    rows: Literal["event", "user"] = "event"  # user: a row holds all of a user's positives
    batch_size: PositiveInt = 4096  # rows a step, over all ranks together
    seed: Seed = 0  # of the order, the split of a user's items and the samples
    shuffle_rows: PositiveInt = 1 << 19  # rows that are permuted together; memory grows with it
    input_share: float = Field(default=0.5, gt=0, lt=1)  # rows: user - how much of a user's items is input
    threads: NonNegativeInt = 1  # that read, hash and make batches ahead; 0: the trainer's own, in between
    prefetch: PositiveInt = 4  # batches made ahead of the trainer
    cache: Path | None = None  # a folder for hashed rows, which later epochs read in place of Parquet
    cache_gb: PositiveFloat = 50.0  # the most that folder may hold


class TowerConfig(Settings):
    """A multi-layer perceptron from the features to the vector."""

    mlp: tuple[PositiveInt, ...] = ()  # widths of the hidden layers, each with ReLU
    project: bool = True  # a last linear layer to model.dim; false: the features' width must be model.dim
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of the features that enter


class ModelConfig(Settings):
    """Both towers and how their vectors meet."""

    dim: PositiveInt = 64
    user_tower: TowerConfig = TowerConfig()
    item_tower: TowerConfig = TowerConfig()
    similarity: Literal["cosine", "dot"] = "cosine"


class NegativesConfig(Settings):
    """Where the items that a user did not take come from; all of them form one set of candidates."""

    in_batch: bool = True  # the other rows' positives, over all ranks
    sampled: NonNegativeInt | Literal["all"] = 0  # drawn evenly from the catalogue a step, over all ranks


class LossConfig(Settings):
    """Softmax of each positive against the candidates."""

    kind: Literal["softmax"] = "softmax"
    temperature: PositiveFloat = 0.1
    log_q: float = Field(default=1.0, ge=0, le=1)  # strength of the correction for how often an item is a candidate
    positive_power: NonNegativeFloat = 1.0  # a row of n positives gives each the weight n ** -positive_power
    mask_history: bool = True  # items of the row's history are not its negatives
    negatives: NegativesConfig = NegativesConfig()

    @model_validator(mode="after")
    def _has_negatives(self) -> Self:
        if not self.negatives.in_batch and self.negatives.sampled == 0:
            raise ValueError(
                "loss.negatives has in_batch: false and sampled: 0, so nothing is left to tell a positive from: "
                "set in_batch: true, or sampled to a count or all."
            )
        return self


class OptimizerConfig(Settings):
    """Fused updates of the tables, and Adam for everything else."""

    sparse: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    lr: PositiveFloat = 0.05  # of the tables
    eps: PositiveFloat = 1e-8  # of Adagrad
    dense_lr: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 0  # both rates rise linearly over them
    schedule: Literal["constant", "linear"] = "constant"  # linear: both rates fall to a fiftieth at the end


class TrainConfig(Settings):
    """How long, and how often one looks."""

    epochs: PositiveInt = 10
    seed: Seed = 0  # of the first weights
    optimizer: OptimizerConfig = OptimizerConfig()
    log_every: PositiveInt = 20  # steps
    evaluate_every: PositiveInt | None = None  # steps; default: after each epoch
    timeout_s: PositiveInt = 300  # a collective that takes longer ends the job
    threads: NonNegativeInt = 0  # of torch on a rank; 0: OMP_NUM_THREADS, or the cores divided by the ranks


class CheckpointConfig(Settings):
    every: PositiveInt | None = None  # steps; default: after each epoch
    keep: PositiveInt = 2  # the newest so many stay, and the best


class EvaluateConfig(Settings):
    k: tuple[PositiveInt, ...] = (10, 20, 50)
    best: str = "recall@20"  # the validation metric that chooses the best step
    users: PositiveInt | None = None  # during training: a seeded sample of so many; default: all
    block: PositiveInt = 1024  # users scored together

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        known = [f"{name}@{k}" for k in self.k for name in ("recall", "ndcg", "hit", "mrr", "precision")]
        if self.best not in known:
            raise ValueError(f"evaluate.best is {self.best!r}, which is not measured{nearest(self.best, known)}.")
        return self


class IndexConfig(Settings):
    target_recall: float = Field(default=0.99, gt=0, le=1)  # of exact search's best k, on held-out users
    k: PositiveInt = 100
    lists: PositiveInt | None = None  # default: by the size of the catalogue
    max_train_vectors: PositiveInt = 500_000
    tune_users: PositiveInt = 4096
    seed: Seed = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"


class RunConfig(Settings):
    """One run, whole: what `train` takes and every later stage finds beside the run's artefacts."""

    data: DataConfig
    tables: dict[str, TableSpec] = Field(default_factory=dict)
    user: tuple[FeatureSpec, ...]
    item: tuple[FeatureSpec, ...]
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    index: IndexConfig = IndexConfig()
    run_dir: Path | None = None  # default: runs/NAME for configs/NAME.yaml

    @property
    def feature_schema(self) -> Schema:
        return Schema.build(self.tables, self.user, self.item)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        schema = self.feature_schema
        for side, tower in (("user", self.model.user_tower), ("item", self.model.item_tower)):
            width = schema.width(side)  # type: ignore[arg-type]
            last = tower.mlp[-1] if tower.mlp else width
            if not tower.project and last != self.model.dim:
                raise ValueError(
                    f"model.{side}_tower has project: false, so its last width {last} must be model.dim = "
                    f"{self.model.dim}: change the dims, or set project: true."
                )
        if self.data.batch_size < 2 and self.loss.negatives.in_batch and self.loss.negatives.sampled == 0:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size}, but in-batch negatives need at least 2 rows: "
                "raise it, or set loss.negatives.sampled."
            )
        return self


# ---------------------------------------------------------------- YAML without its traps


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core words: `no` and `NO` stay text, `1e-3` is a number, `12:30` and dates stay text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """`010` is ten: no octal, no base 60."""
    return int(loader.construct_scalar(node).replace("_", ""))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(
                f"line {key_node.start_mark.line + 1}: a key is itself a list or a mapping: "
                "quote text that begins with a brace or a bracket."
            )
        name = key_node.value
        if name in seen:
            raise ConfigError(
                f"line {key_node.start_mark.line + 1}: the key {name!r} stands already at line {seen[name]}: keep one."
            )
        seen[name] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text; raises ConfigError naming `origin` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{origin}, {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin} is not YAML: {error}") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; raises ConfigError naming it and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error}): save it as UTF-8.") from None
    return parse_yaml(text, str(path))


def to_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text by the same rules as `_Loader` reads it; floats keep every digit."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line breaks beyond the usual one survive only as escapes, so in double quotes."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Dumper.add_representer(str, _text)


# ---------------------------------------------------------------- load, override, save


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """The config of a YAML file with `key.part=value` overrides; raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"There is no config file {path}{nearest(path.name, near)}.")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not sections such as data, user, item and model.")
    values = apply_overrides(values, overrides)
    if values.get("run_dir") is None:
        values["run_dir"] = f"runs/{path.stem}"
    return validate(RunConfig, values, str(path))


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1"]` -> {"a.b": 1}; the values are read as YAML."""
    parsed = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"{override!r} is not an override: write key=value, such as train.epochs=3.")
        parsed[name] = parse_yaml(text, f"The value of {name}")
    return parsed


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `key.part=value` set; list elements are named by number or by their `name`."""
    result = json.loads(json.dumps(values, default=str))
    for name, value in parse_overrides(overrides).items():
        *parents, last = name.split(".")
        place = result
        for part in parents:
            place = _step_into(place, part, name)
        if isinstance(place, list):
            place[_position(place, last, name)] = value
        else:
            place[last] = value
    return result


def _step_into(place: Any, part: str, name: str) -> Any:
    if isinstance(place, list):
        inner = place[_position(place, part, name)]
    else:
        if place.get(part) is None:
            place[part] = {}
        inner = place[part]
    if not isinstance(inner, dict | list):
        raise ConfigError(f"{name}: {part!r} is {inner!r}, which has no parts to set.")
    return inner


def _position(place: list[Any], part: str, name: str) -> int:
    if part.isdigit() and int(part) < len(place):
        return int(part)
    names = [element.get("name") for element in place if isinstance(element, dict)]
    if part in names:
        return names.index(part)
    raise ConfigError(f"{name}: no element {part!r} in a list of {len(place)}{nearest(part, filter(None, names))}.")


def validate(model: type[Model], values: Mapping[str, Any], origin: str) -> Model:
    """`values` as a `model`; raises ConfigError with one line for each mistake, nearest names included."""
    try:
        return model.model_validate(values)
    except ConfigError:
        raise
    except ValidationError as error:
        lines = [_mistake(model, detail) for detail in error.errors()]
        raise ConfigError(f"{origin}: " + "\n  ".join(dict.fromkeys(lines))) from None


def _mistake(model: type[BaseModel], detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        *parents, last = detail["loc"]
        return f"unknown key {place!r}{nearest(str(last), _fields(model, parents))}."
    if detail["type"] == "missing":
        return f"{place!r} is missing: it has no default."
    if detail["type"] in ("value_error", "assertion_error"):
        return str(detail["ctx"]["error"])
    return f"{place!r} is {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}."


def _fields(model: Any, path: list[str | int]) -> list[str]:
    """The keys that may stand at `path` below `model`."""
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        else:
            inner = [arg for arg in get_args(model) if isinstance(arg, type) and issubclass(arg, BaseModel)]
            model = inner[0] if inner else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        inner = [arg for arg in get_args(model) if isinstance(arg, type) and issubclass(arg, BaseModel)]
        model = inner[0] if inner else None
    return list(model.model_fields) if model is not None else []


def as_values(config: BaseModel) -> dict[str, Any]:
    """The config as plain values, as they stand in YAML and JSON."""
    return config.model_dump(mode="json")


# What may change between two starts of one run, because it changes no batch and no weight before the next step.
_FREE = ("train.epochs", "train.log_every", "train.evaluate_every", "train.timeout_s", "train.threads",
         "checkpoint", "evaluate", "index", "run_dir", "data.dataset", "data.prefetch",
         "data.threads", "data.cache", "data.cache_gb")  # fmt: skip


def _binding(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run what it is, flat: {"model.dim": 64, ...}."""
    flat: dict[str, Any] = {}

    def walk(value: Any, place: str) -> None:
        if place in _FREE:
            return
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{place}.{name}" if place else name)
        elif place in ("user", "item"):
            flat[place] = [feature["name"] for feature in value]  # their order is the order of the tower's input
            for feature in value:
                walk(feature, f"{place}.{feature['name']}")
        else:
            flat[place] = value

    walk(as_values(config), "")
    return flat


def config_hash(config: RunConfig) -> str:
    """Twelve hex digits that change with any setting that binds a run."""
    return hashlib.sha256(json.dumps(_binding(config), sort_keys=True).encode()).hexdigest()[:12]


def check_same_run(saved: RunConfig, given: RunConfig, run_dir: Path) -> None:
    """Raises ConfigError listing the fields in which a run folder's config differs from the one given."""
    old, new = _binding(saved), _binding(given)
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if names:
        shown = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in names[:8])
        more = f" (and {len(names) - 8} more)" if len(names) > 8 else ""
        raise ConfigError(
            f"{run_dir} belongs to another config: {shown}{more}. "
            "Give this run a folder of its own (run_dir=...), or take the old settings back."
        )
