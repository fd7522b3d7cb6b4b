"""Options of `prepare synthetic`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from trec_twotower.data.sources.options import SourceOptions
from trec_twotower.data.sources.synthetic.words import COUNTRIES

MIN_EVENTS = 3  # per user: one for train, one for valid, one for test


class Options(SourceOptions):
    """Size and seed of the synthetic dataset."""

    users: PositiveInt = Field(20_000, description="number of users")
    items: int = Field(5_000, ge=10, description="number of items")
    clusters: int = Field(50, ge=2, description="number of clusters of users and items")
    events_per_user: float = Field(
        12.0, ge=MIN_EVENTS, description="the mean; at least 3 per user if there are enough items"
    )
    rows: PositiveInt | None = Field(None, description="approximate number of train rows: sets users")
    seed: int = Field(0, ge=0, description="seed of all that is generated")
    countries: int = Field(12, ge=1, le=len(COUNTRIES), description="number of countries of the users")
    new_items: float = Field(0.05, ge=0, lt=1, description="share of items that only valid/ and test/ have: cold items")
    max_history: PositiveInt = Field(50, description="newest items kept in a train row")
    min_history: int = Field(0, ge=0, description="train rows with fewer earlier items are left out")
    rows_per_piece: PositiveInt = Field(131_072, description="events generated at a time; does not affect the output")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.clusters > self.items:
            raise ValueError(f"{self.clusters:,} clusters need one item each or more, but there are {self.items:,}")
        if self.events_per_user > self.items / 4:
            raise ValueError(
                f"events_per_user is {self.events_per_user:g}, but of {self.items:,} items users can interact with at "
                f"most a quarter on average: set items = {int(4 * self.events_per_user) + 1:,} or more"
            )
        if self.rows is not None and "users" in self.model_fields_set and self.users != self._users():
            raise ValueError(
                f"rows = {self.rows:,} means {self._users():,} users, but users is {self.users:,}: give one of the two"
            )
        return self

    def resolve(self) -> Options:
        """Return these options with `users` computed from `rows`."""
        return self.model_copy(update={"users": self._users()})

    def _users(self) -> int:
        if self.rows is None:
            return self.users
        return max(1, round(self.rows / max(1.0, self.events_per_user - 2 - self.min_history)))
