"""Settings of the training data and its order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from trec_twotower.config.base import Seed, Settings
from trec_twotower.errors import ConfigError


class FollowConfig(Settings):
    """A train/ folder to which files are added while the run reads it; each file is read once."""

    poll_s: PositiveFloat = 10.0  # seconds between checks for new files while the run waits
    idle_s: NonNegativeFloat | None = None  # seconds without a new file after which the run ends; default: never


def _path_text(path: Any) -> Any:
    return str(path) if isinstance(path, Path) else path


class DataConfig(Settings):
    dataset: Annotated[str, BeforeValidator(_path_text)]  # directory that `prepare` wrote, or a URL for fsspec
    # event: one row per interaction; user: one per user with all positives, of train_users/ if present.
    rows: Literal["event", "user"] = "event"
    batch_size: PositiveInt = 4096  # rows per step over all ranks
    seed: Seed = 0  # seed of the row order, the split of a user's items, and sampling
    shuffle_rows: PositiveInt = 1 << 19  # rows that are permuted together; memory grows with them
    # Share of a user's items that become input with rows: user; the others are positives. 0: all are positives.
    input_share: float = Field(default=0.5, ge=0, lt=1)
    threads: NonNegativeInt = 1  # threads that read, hash and build batches; 0: the training thread does this
    prefetch: PositiveInt | None = None  # number of batches to prefetch; default: 32, or fewer if batches are large
    cache: Path | None = None  # directory for hashed rows, which later epochs read in place of Parquet
    cache_gb: PositiveFloat = 50.0  # size limit of that directory in GB
    # The target item of a row in the row's own history: keep it, drop it from the history, or raise an error.
    target_in_history: Literal["keep", "drop", "error"] = "keep"
    drop_last: bool = False  # skip the last rows of an epoch if they do not fill a batch
    follow: FollowConfig | None = None  # train on a growing directory, without epochs and cache

    @model_validator(mode="after")
    def _check_target_in_history(self) -> Self:
        if self.target_in_history != "keep" and self.rows == "user":
            raise ConfigError(
                f"data.target_in_history is {self.target_in_history}, but with data.rows: user the history never holds "
                "a target: remove it."
            )
        return self
