"""Settings of evaluation and the search index."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trec_twotower.config.base import Seed, Settings
from trec_twotower.errors import ConfigError, nearest

METRICS = ("recall", "ndcg", "hit", "mrr", "map", "precision")  # measured on one user's ranking, at each of evaluate.k
SLICES = ("tail", "popularity", "activity")  # besides user.COLUMN and item.COLUMN


class EvaluateConfig(Settings):
    k: tuple[PositiveInt, ...] = (10, 20, 50)  # lengths of the evaluated rankings
    best: str = "recall@20"  # validation metric that selects the best step
    users: PositiveInt | None = None  # size of the seeded sample of users in training; default: all
    block: PositiveInt = 1024  # users scored together
    # History items that are excluded from a row's ranking: true: all, false: none, except_target: all but the targets.
    # `recommend` and `serve`, which have no targets, exclude all of them unless this is false.
    exclude_seen: bool | Literal["except_target"] = True
    slices: tuple[str, ...] = SLICES  # groups with metrics of their own: these, user.COLUMN or item.COLUMN
    item_to_item: bool = True  # the item-to-item baseline (co-occurrence)
    svd: NonNegativeInt = 64  # dim of the truncated-SVD baseline; 0: none
    bootstrap: NonNegativeInt = 1000  # bootstrap resamples for confidence intervals; 0: no intervals
    sampled: NonNegativeInt = 0  # sampled negatives per positive for sampled metrics; 0: none
    sampled_same: str | None = None  # column of items/: sampled negatives that share the positive's value, in addition

    @property
    def best_label(self) -> str:
        """Return the metric `best` and what it excludes: values under different labels are not comparable."""
        if self.exclude_seen is True:
            return self.best
        return f"{self.best}, exclude_seen {str(self.exclude_seen).lower()}"

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        measured = [f"{name}@{k}" for k in self.k for name in METRICS]
        if self.best not in measured:
            raise ConfigError(f"evaluate.best is {self.best!r}, which is not measured{nearest(self.best, measured)}.")
        if self.sampled_same is not None and not self.sampled:
            raise ConfigError(
                f"evaluate.sampled_same is {self.sampled_same!r}, but no negatives are sampled: set evaluate.sampled, "
                "such as 100 (evaluate --sampled 100), or remove sampled_same."
            )
        for name in self.slices:
            side, dot, column = name.partition(".")
            if name not in SLICES and not (side in ("user", "item") and dot and column):
                known = [*SLICES, "user.COLUMN", "item.COLUMN"]
                raise ConfigError(
                    f"evaluate.slices names {name!r}{nearest(name, known)}: give any of {', '.join(known)}."
                )
        return self


class IndexConfig(Settings):
    target_recall: float = Field(default=0.99, gt=0, le=1)  # share of exact search's best k, on held-out users
    k: PositiveInt = 100  # length of the rankings that the index is tuned for
    memory_gb: PositiveFloat | None = None  # memory limit of the index in GB; default: none
    factory: str | None = None  # FAISS factory string, such as IVF1024,SQfp16; default: chosen by the settings above
    lists: PositiveInt | None = None  # number of IVF lists; default: by the size of the catalogue
    shards: PositiveInt | None = None  # number of indexes that share the items; default: by their size
    max_train_vectors: PositiveInt | None = None  # number of training vectors; default: 48 per list, 65,536 for codes
    tune_users: PositiveInt = 4096  # number of users for tuning
    seed: Seed = 0  # seed of the users for tuning and of the training vectors
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where the index is trained; auto: a GPU if FAISS can use one
    blas_batch: PositiveInt = 4  # smallest user batch that exact search scores with BLAS; others use FAISS's loop

    @model_validator(mode="before")
    @classmethod
    def _remove_latency(cls, values: Any) -> Any:
        """Return the values without `latency: online`, which configs saved by earlier versions have."""
        if isinstance(values, dict) and "latency" in values:
            if values["latency"] != "online":
                raise ConfigError(
                    f"index.latency is {values['latency']!r}, but the setting was removed: the other kind of index "
                    "was many times slower to build, and slower in batches. Remove latency."
                )
            values = {name: value for name, value in values.items() if name != "latency"}
        return values

    @model_validator(mode="after")
    def _check_factory(self) -> Self:
        conflicts = [name for name in ("lists", "memory_gb") if getattr(self, name) is not None]
        if self.factory is not None and conflicts:
            raise ConfigError(
                f"index.factory is {self.factory!r}, which determines the index, but index.{conflicts[0]} is set, too: "
                "remove one of them."
            )
        return self
