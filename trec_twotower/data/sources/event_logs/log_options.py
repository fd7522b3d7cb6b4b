"""Options that all event-log sources share: filters and the split."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from trec_twotower.data.sources.options import SourceOptions

ORDER = "order of the event"  # internal column: orders events of equal time


def _seconds(value: Any) -> Any:
    """Return a date or time as seconds since 1970. A time without a zone is UTC."""
    if isinstance(value, str) and not value.isdecimal():
        value = datetime.datetime.fromisoformat(value)
    elif isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
        value = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
        return int(value.timestamp())
    return value


Moment = Annotated[int, BeforeValidator(_seconds)]


Split = Literal["leave-last-out", "last-basket", "time", "position", "random", "none"]


class LogOptions(SourceOptions):
    """Filters and split of an event log."""

    max_history: PositiveInt = Field(50, description="newest items kept in a train row; valid and test rows keep all")
    min_history: int = Field(0, ge=0, description="train rows with fewer earlier items are left out")
    rows: Literal["event", "both"] = Field(
        "event", description="both: also write train_users/, one row per user, for data.rows: user"
    )
    split: Split = Field(
        "leave-last-out",
        description="what is held out for valid/ and test/: the last two items of each user (leave-last-out), all "
        "events after a time (time), or nothing (none); docs/data.md describes the others",
    )
    hold_out: Literal["new", "any"] = Field(
        "new", description="new: hold out only items without an earlier event of the user"
    )
    valid_from: Moment | None = Field(
        None, description="split = time: the start of valid/, in seconds or as a date such as 2024-05-31"
    )
    test_from: Moment | None = Field(None, description="split = time: the start of test/, as valid_from")
    min_user_events: PositiveInt = Field(
        1, description="k-core: drop rare users and items until all have enough events"
    )
    min_item_events: PositiveInt = Field(1, description="the same for items")
    dedupe: bool = Field(False, description="keep only the first event of the same user and item")
    memory_gb: float = Field(4.0, ge=0.1, description="memory limit of DuckDB in GB; beyond it, it spills to disk")

    @model_validator(mode="after")
    def _split_fits(self) -> Self:
        moments_set = [name for name in ("valid_from", "test_from") if name in self.model_fields_set]
        moments_set = [name for name in moments_set if getattr(self, name) is not None]
        if self.split != "time" and moments_set:
            raise ValueError(f"{moments_set[0]} is set, but split is {self.split}: set split = time, or leave it out")
        if self.hold_out == "any" and self.split in ("random", "none"):
            why = "all events of an item go together" if self.split == "random" else "nothing is held out"
            raise ValueError(f"hold_out = any is set, but with split = {self.split} {why}: leave hold_out out")
        if self.split == "time" and (self.valid_from is None or self.test_from is None):
            raise ValueError("split = time needs both valid_from and test_from, such as 2024-05-31")
        if self.split == "time" and not self.periods["valid"][0] < self.periods["test"][0]:
            raise ValueError(
                f"valid_from ({utc(self.valid_from)}) is not before test_from ({utc(self.test_from)}): swap them"
            )
        return self

    @property
    def kept(self) -> list[str]:
        """Return the event columns of train rows other than the ids, `timestamp` first."""
        return ["timestamp"]

    @property
    def asked(self) -> list[str]:
        """Return the columns of `kept` that valid, test and serving rows have as well."""
        return ["timestamp"]

    @property
    def outcome_columns(self) -> list[str]:
        """Return the columns known only after an event. Rows have them for earlier events only."""
        return []

    @property
    def has_times(self) -> bool:
        """Return whether `timestamp` is a real time that the dataset keeps, rather than a sequence number."""
        return True

    @property
    def order_columns(self) -> list[str]:
        """Return the columns of the table `events` that order events of equal time."""
        return []

    @property
    def tie_seed(self) -> int | None:
        """Return the seed that orders events of unknown order at random, or None to order them by item id."""
        return None

    @property
    def draws_order(self) -> bool:
        """Return whether the random order counts as known, because nothing else orders the events."""
        return False

    @property
    def shares(self) -> tuple[float, float]:
        """Return the shares of each user's items held out for valid and test when split = random."""
        return 0.0, 0.0

    @property
    def periods(self) -> dict[str, tuple[int, int]]:
        """Return the [start, stop) range of valid and test in microseconds when split = time."""
        assert self.valid_from is not None and self.test_from is not None
        valid, test = (second * 1_000_000 for second in (self.valid_from, self.test_from))
        return {"valid": (valid, test), "test": (test, 2**63 - 1)}


def utc(second: int | None) -> str:
    assert second is not None
    return f"{datetime.datetime.fromtimestamp(second, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
