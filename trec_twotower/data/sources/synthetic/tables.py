"""The tables of the synthetic dataset: items, users, and the rows of interactions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.data.sources.synthetic.interaction_model import LEVELS, Events, InteractionModel
from trec_twotower.data.sources.synthetic.words import (
    ADJECTIVES,
    BUDGETS,
    COUNTRIES,
    DEVICES,
    NUM_TAGS,
    kind_of_goods,
)
from trec_twotower.data.sources.writer import list_column

FIRST_TIME = 1_672_531_200  # 2023-01-01, seconds
DAY_S, DAYPART_S = 86_400, 21_600


class Tables:
    """Turns what the model draws into Arrow tables."""

    def __init__(self, model: InteractionModel) -> None:
        self.model, self.options, self.chance = model, model.options, model.chance
        self.item_id = self.chance.sparse_id("item id", np.arange(self.options.items))
        self._categories, self._nouns, self._tags = zip(
            *(kind_of_goods(cluster) for cluster in range(self.options.clusters)), strict=True
        )

    def interactions(self, events: Events) -> dict[str, pa.Table]:
        """Return the train, valid and test rows of these users; a split without rows is omitted."""
        owner, starts, ends = events.owner, events.offsets[:-1], events.offsets[1:]
        user_id = self.user_id(events.user)
        item_id = self.item_id[events.item]
        context = {"timestamp": self._timestamps(events), "device": self._devices(events)}
        session_starts = np.maximum.accumulate(np.where(events.situation.starts, np.arange(len(owner)), 0))

        def rows(event: np.ndarray, history_starts: np.ndarray, positive: dict[str, Any]) -> pa.Table:
            columns = {"user_id": user_id[owner[event]], **positive}
            columns |= {name: column.take(pa.array(event)) for name, column in context.items()}
            columns["session"] = list_column(item_id, session_starts[event], event)
            return pa.table(columns | {"history": list_column(item_id, history_starts, event)})

        train = np.flatnonzero(events.is_train)
        earlier = train - starts[owner[train]]
        train = train[earlier >= self.options.min_history]
        oldest = np.maximum(starts[owner[train]], train - self.options.max_history)
        tables = {"train": rows(train, oldest, {"item_id": item_id[train]})}
        for split, back in (("valid", 2), ("test", 1)):
            event = (ends - back)[events.is_tested]
            positives = list_column(item_id, event, event + 1)
            tables[split] = rows(event, starts[events.is_tested], {"positives": positives})
        return {split: table for split, table in tables.items() if len(table)}

    def _timestamps(self, events: Events) -> pa.Array:
        """Return times in seconds: sessions on different days, each in its part of the day, minutes between events."""
        owner, situation = events.owner, events.situation
        user = events.user[owner]
        event = np.arange(len(owner)) - events.offsets[:-1][owner]
        is_later = event > 0
        days = 1 + np.floor(-4 * np.log1p(-self.chance("days", user, event))).astype(np.int64)
        day = _running(np.where(situation.starts & is_later, days, 0), events.offsets)
        first_day = (180 * self.chance("first day", events.user)).astype(np.int64)[owner]
        begin = 1 + (DAYPART_S - 2 * 3600) * self.chance("second of daypart", user, event)
        session_starts = np.maximum.accumulate(np.where(situation.starts, np.arange(len(owner)), 0))
        waited = _running(np.where(situation.starts, 0, 30 + (150 * self.chance("gap", user, event))), events.offsets)
        within = begin[session_starts] + waited - waited[session_starts]
        time = FIRST_TIME + (first_day + day) * DAY_S + situation.daypart * DAYPART_S
        return pa.array(time + within.astype(np.int64))

    def _devices(self, events: Events) -> pa.Array:
        """Return devices. Each user has a favourite, mostly that of the main cluster, and uses it in 80 % of events."""
        main = self.model.users(events.user).main
        favourite = self._mostly("device", events.user, main, len(DEVICES), 0.7)
        user = events.user[events.owner]
        event = np.arange(len(user)) - events.offsets[:-1][events.owner]
        point = self.chance("device used", user, event)
        other = ((point - 0.8) * 5 * len(DEVICES)).astype(np.int64)
        return _words(DEVICES, np.where(point < 0.8, favourite[events.owner], other))

    def _mostly(self, what: str, user: np.ndarray, main: np.ndarray, choices: int, share: float) -> np.ndarray:
        """Return the main cluster's choice with probability `share`, else a random one, mostly of the first ones."""
        home = (self.chance(f"{what} of cluster", main) ** 1.5 * choices).astype(np.int64)
        drawn = (self.chance(f"{what} otherwise", user) ** 2 * choices).astype(np.int64)
        return np.where(self.chance(f"{what} is usual", user) < share, home, drawn)

    def user_id(self, user: np.ndarray) -> np.ndarray:
        return self.chance.sparse_id("user id", user)

    def users(self, number: np.ndarray) -> pa.Table:
        """Return user_id, country, age and budget; each depends on the preferences and is sometimes null."""
        users = self.model.users(number)
        country = self._mostly("country", number, users.main, self.options.countries, 0.5)
        centre = 22 + 40 * self.chance("age of cluster", users.main)
        age = np.clip(np.rint(centre + 7 * self.chance.normal("age", number)), 16, 90)
        stated = (LEVELS * self.chance("stated budget", number)).astype(np.int64)
        budget = np.where(self.chance("budget is true", number) < 0.9, users.level, stated)
        return pa.table(
            {
                "user_id": self.user_id(number),
                "country": _words(COUNTRIES, country, self.chance("country known", number) >= 0.03),
                "age": pa.array(age, pa.float32(), mask=self.chance("age known", number) < 0.05),
                "budget": _words(BUDGETS, budget, self.chance("budget known", number) >= 0.03),
            }
        )

    def catalogue(self, items_per_piece: int = 65_536) -> Iterator[pa.Table]:
        """Yield the items ordered by item_id, so that the position in the file is independent of the cluster."""
        order = np.argsort(self.item_id)
        for start in range(0, len(order), items_per_piece):
            item = order[start : start + items_per_piece]
            yield self._items(item, np.arange(start, start + len(item)))

    def _items(self, item: np.ndarray, place: np.ndarray) -> pa.Table:
        cluster = self.model.cluster_of[item]
        adjective = _words(ADJECTIVES, (self.chance("adjective", item) * len(ADJECTIVES)).astype(int))
        number = pc.utf8_lpad(pa.array(place).cast(pa.string()), width=4, padding="0")
        level = 2.2 + 1.2 * self.model.item_level[item] + 0.3 * self.chance("price of cluster", cluster)
        price = np.maximum(0.01, np.rint(100 * np.exp(level + 0.2 * self.chance.normal("price", item))) / 100)
        # A rating falls with the rank: all that is known of the popularity of a new item.
        rank = item - self.model.cluster_starts[cluster]
        rating = np.clip(4.8 - 0.45 * np.log(rank + 1.0) + 0.1 * self.chance.normal("rating", item), 1.0, 5.0)
        return pa.table(
            {
                "item_id": self.item_id[item],
                "title": pc.binary_join_element_wise(adjective, _words(self._nouns, cluster), number, " "),
                "category": _words(self._categories, cluster),
                "tags": self._tag_lists(item, cluster),
                "price": pa.array(price, pa.float32(), mask=self.chance("price known", item) < 0.03),
                "rating": pa.array(np.rint(10 * rating) / 10, pa.float32()),
            }
        )

    def _tag_lists(self, item: np.ndarray, cluster: np.ndarray) -> pa.ListArray:
        """Return 2 to 4 of the cluster's tags for each item; 4 % of items have none."""
        position, count = self.model.tag_positions(item)
        tag = cluster[:, None] * NUM_TAGS + position
        starts = np.arange(len(item)) * NUM_TAGS
        lists = list_column(tag.reshape(-1), starts, starts + count)
        return pa.ListArray.from_arrays(lists.offsets, _words(sum(self._tags, ()), lists.values.to_numpy()))


def _running(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the running sums of each list."""
    total = np.append(0, np.cumsum(values))
    return total[1:] - np.repeat(total[offsets[:-1]], np.diff(offsets))


def _words(words: Any, number: np.ndarray, known: np.ndarray | None = None) -> pa.Array:
    """Return words[number] as a column of strings, null where it is not known."""
    mask = None if known is None else ~known
    return pa.array(list(words), pa.string()).take(pa.array(number, pa.int32(), mask=mask))
