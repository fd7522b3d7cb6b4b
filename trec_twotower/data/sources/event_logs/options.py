"""Options of `prepare events`: files of the log, column names and split."""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self

from pydantic import Field, model_validator

from trec_twotower.data.sources.event_logs.log_options import ORDER
from trec_twotower.data.sources.tables.table_options import TableName, TableOptions

OURS = ("user_id", "item_id", "timestamp", "weight", "positives", "history")
IN_FILES = "file"  # order = file: the order of rows in the files


class Options(TableOptions):
    """Files of the log, column names and split."""

    events: str = Field(
        min_length=1, description="a file, a folder or a glob ('raw/*.csv.gz') of Parquet, CSV or JSON lines"
    )
    items: str | None = Field(
        None,
        description="one row per item with its features, same formats; without it, the distinct items of the events",
    )
    users: str | None = Field(None, description="one row per user with its features, same formats")
    user: str = Field("user_id", description="user id column of the events and of `users`")
    item: str = Field("item_id", description="item id column of the events and of `items`")
    timestamp: str | None = Field(
        "timestamp", description="column of times: timestamps, dates or seconds since 1970; null: the log has no times"
    )
    order: str | None = Field(
        None, description="a column that orders events of equal time; file: the order of rows in the files"
    )
    weight: str | None = Field(None, description="event column stored as `weight` in train rows")
    context: tuple[str, ...] = Field((), description="further event columns to keep, known before the interaction")
    outcomes: tuple[str, ...] = Field((), description="columns known only after the interaction, kept as history_NAME")
    valid_share: float = Field(
        0.1, ge=0, lt=1, description="share of each user's items held out for valid/; split = random only"
    )
    test_share: float = Field(0.1, ge=0, lt=1, description="the same for test/; split = random only")
    seed: int = Field(0, ge=0, lt=2**63, description="seeds split = random and the order of tied events")
    rating: str | None = Field(None, description="event column with ratings; with min_rating")
    min_rating: float | None = Field(None, description="events with a lower rating are left out; with rating")
    missing_rows: Literal["keep", "error"] = Field(
        "keep",
        description="error: refuse users and items of the events without a row in `users` or `items`; keep: with nulls",
    )

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        columns = [self.user, self.item, *([self.timestamp] if self.timestamp and self.has_times else [])]
        columns += [*([self.weight] if self.weight and self.weight not in self.outcomes else []), *self.context]
        twice = [name for name, count in Counter(map(str.casefold, [*columns, *self.outcomes])).items() if count > 1]
        if twice:
            raise ValueError(
                f"column {twice[0]!r} is named twice among user, item, timestamp, weight, context and outcomes"
            )
        if (self.rating is None) != (self.min_rating is None):
            raise ValueError("rating and min_rating go together: the column of ratings, and the lowest that counts")
        if self.rating is not None and self.rating in (self.user, self.item, self.timestamp):
            raise ValueError(f"rating = {self.rating} is the column of users, items or times")
        histories = [f"history_{name}".casefold() for name in self.outcomes]
        reserved = [name for name in self.context if name.casefold() in (*OURS, *histories)]
        if reserved:
            raise ValueError(f"context column {reserved[0]!r} has the name of a column of the dataset: rename it")
        return self

    @model_validator(mode="after")
    def _order_fits(self) -> Self:
        if self.timestamp is None and self.split not in ("position", "random", "none"):
            raise ValueError(
                f"timestamp is null, but split = {self.split} needs times: name the column, or set split = position "
                "(rows are in order in the files) or split = random"
            )
        if self.split == "position" and self.timestamp not in (None, "timestamp"):
            raise ValueError(
                f"timestamp = {self.timestamp!r} is set, but split = position reads no times: leave timestamp out, or "
                "use split = leave-last-out with order = file"
            )
        if self.split == "last-basket" and self.order is not None:
            raise ValueError(
                f"order = {self.order} is set, but split = last-basket holds out all items of one time: leave order "
                "out, or use split = leave-last-out"
            )
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        given = [name for name in ("valid_share", "test_share") if getattr(self, name) != 0.1]
        if self.split != "random" and given:
            raise ValueError(f"{given[0]} is set, but split is {self.split}: set split = random, or leave it out")
        if self.valid_share + self.test_share >= 1:
            raise ValueError(
                f"valid_share + test_share = {self.valid_share + self.test_share:g} leaves nothing to train on: they "
                "must be below 1 together"
            )
        if self.split == "random" and not self.valid_share + self.test_share:
            raise ValueError("valid_share and test_share are 0, so nothing is held out: set split = none for that")
        return self

    def named_columns(self, table: TableName) -> list[str]:
        if table != "events":
            return [self.item if table == "items" else self.user]
        order = self.order if self.order != IN_FILES else None
        others = [self.timestamp if self.has_times else None, self.weight, self.rating, order]
        return [self.user, self.item, *(name for name in others if name is not None), *self.context, *self.outcomes]

    @property
    def kept(self) -> list[str]:
        return ["timestamp", *(["weight"] if self.weight else []), *self.context]

    @property
    def asked(self) -> list[str]:
        return ["timestamp", *self.context]

    @property
    def outcome_columns(self) -> list[str]:
        return list(self.outcomes)

    @property
    def has_times(self) -> bool:
        return self.timestamp is not None and self.split != "position"

    @property
    def order_columns(self) -> list[str]:
        return [ORDER] if self.order is not None or not (self.has_times or self.draws_order) else []

    @property
    def tie_seed(self) -> int | None:
        return self.seed

    @property
    def draws_order(self) -> bool:
        return self.split == "random" and self.order is None and not self.has_times

    @property
    def shares(self) -> tuple[float, float]:
        return self.valid_share, self.test_share
