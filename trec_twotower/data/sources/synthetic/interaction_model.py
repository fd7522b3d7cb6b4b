"""The interaction model of the synthetic dataset: every preference, and so the best reachable recall, is known.

Items belong to clusters, and within a cluster popularity is a power law of the rank. An interaction is with an item of
the user's main cluster with probability .6, of a second cluster with .25, and of the whole catalogue with .15:

    P(item | user) = p(item | cluster) * (.6 [main] + .25 [second] + .15 popularity(cluster))

A user's items are drawn from this distribution and repeats are skipped, so the next item follows P(item | user)
restricted to the unseen items. Every number is a function of the seed and of its purpose (which user, which draw):
pieces of any size give the same dataset, in constant memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.data.sources.synthetic.options import MIN_EVENTS, Options
from trec_twotower.data.sources.synthetic.words import (
    ADJECTIVES,
    COUNTRIES,
    DEVICES,
    NUM_TAGS,
    kind_of_goods,
)
from trec_twotower.data.sources.writer import list_column
from trec_twotower.ops.hashing import SPLITMIX_FACTORS, SPLITMIX_STEP, mix_array
from trec_twotower.ops.ragged import offsets_of

MAIN_SHARE, SECOND_SHARE, GLOBAL_SHARE = 0.6, 0.25, 0.15
ITEM_EXPONENT = 1.0  # exponent of the popularity by rank within a cluster
CLUSTER_EXPONENT = 0.5  # exponent of the popularity by rank among clusters
SIZE_EXPONENT = 0.3  # exponent of the number of items by rank among clusters
FIRST_TIME = 1_672_531_200  # 2023-01-01, seconds
_MASK_63 = np.uint64(2**63 - 1)


@dataclass(frozen=True)
class Events:
    """The interactions of some users in order: those of user r are `item[offsets[r] : offsets[r + 1]]`."""

    user: np.ndarray  # the users' numbers
    offsets: np.ndarray
    item: np.ndarray  # the items' numbers

    @property
    def is_tested(self) -> np.ndarray:
        """Return for each user whether the last two items are held out."""
        return np.diff(self.offsets) >= MIN_EVENTS

    @property
    def owner(self) -> np.ndarray:
        """Return for each event the position of its user in `user`."""
        return np.repeat(np.arange(len(self.user)), np.diff(self.offsets))

    @property
    def is_train(self) -> np.ndarray:
        """Return for each event whether it is in the training split."""
        train_end = self.offsets[1:] - 2 * self.is_tested
        return np.arange(len(self.item)) < np.repeat(train_end, np.diff(self.offsets))

    def only(self, kept: np.ndarray) -> Events:
        """Return the events of the marked users."""
        offsets = offsets_of(np.diff(self.offsets)[kept])
        return Events(self.user[kept], offsets, self.item[kept[self.owner]])


class InteractionModel:
    """The distribution of interactions. Users and items are numbered from 0; items are sorted by cluster and rank."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._salts: dict[str, np.uint64] = {}
        clusters = np.arange(options.clusters)
        by_size = np.argsort(self.chance("cluster size", clusters))
        by_popularity = np.argsort(self.chance("cluster popularity", clusters))
        weight = np.empty(options.clusters)
        weight[by_size] = (clusters + 1.0) ** -SIZE_EXPONENT
        size = _apportion(options.items, weight)
        self.cluster_starts = offsets_of(size)
        self.cluster_popularity = np.empty(options.clusters)
        self.cluster_popularity[by_popularity] = (clusters + 1.0) ** -CLUSTER_EXPONENT
        self.cluster_popularity /= self.cluster_popularity.sum()

        self.cluster_of = np.repeat(clusters, size)
        rank = np.arange(options.items) - self.cluster_starts[self.cluster_of]
        falling = (rank + 1.0) ** -ITEM_EXPONENT
        self.share_in_cluster = falling / np.bincount(self.cluster_of, falling)[self.cluster_of]
        self.global_share = self.share_in_cluster * self.cluster_popularity[self.cluster_of]
        # A number from [c, c + 1) selects an item of cluster c; c = clusters means the whole catalogue.
        running = np.append(0.0, np.cumsum(self.share_in_cluster))
        within = running[1:] - running[self.cluster_starts[self.cluster_of]]
        within[self.cluster_starts[1:] - 1] = 1.0
        everything = np.cumsum(self.global_share)
        everything[-1] = 1.0
        self._edges = np.concatenate([self.cluster_of + within, options.clusters + everything])

        self.item_id = self._sparse_id("item id", np.arange(options.items))
        self._categories, self._nouns, self._tags = zip(
            *(kind_of_goods(cluster) for cluster in range(options.clusters)), strict=True
        )

    def chance(self, what: str, number: np.ndarray, draw: np.ndarray | None = None) -> np.ndarray:
        """Return a value in [0, 1) per number (and draw): a function of these, the seed and the purpose `what`."""
        if what not in self._salts:
            digest = hashlib.blake2b(f"{self.options.seed}/{what}".encode(), digest_size=8)
            self._salts[what] = np.uint64(int.from_bytes(digest.digest(), "little"))
        bits = _output(self._salts[what], number)
        if draw is not None:
            bits = _output(bits, draw)
        return (bits >> np.uint64(11)) * 2.0**-53

    def interests(self, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the main and the second cluster of each user, which are different."""
        upper = np.cumsum(self.cluster_popularity)
        last = self.options.clusters - 1
        main = np.minimum(np.searchsorted(upper, self.chance("main", user), side="right"), last)
        own = self.cluster_popularity[main]
        point = self.chance("second", user) * (1 - own)
        point = np.where(point >= upper[main] - own, point + own, point)  # steps over the main cluster
        second = np.minimum(np.searchsorted(upper, point, side="right"), last)
        return main, np.where(second == main, (main + 1) % self.options.clusters, second)

    def num_events(self, user: np.ndarray) -> np.ndarray:
        """Return each user's number of items: 3 plus the sum of two geometric numbers (long-tailed)."""
        mean = max(self.options.events_per_user - MIN_EVENTS, 1e-9) / 2
        log_stay = np.log(mean / (1 + mean))
        more = sum((np.log1p(-self.chance(f"events {part}", user)) / log_stay).astype(np.int64) for part in (1, 2))
        return np.minimum(MIN_EVENTS + more, self.options.items // 2)

    def events(self, user: np.ndarray) -> Events:
        """Return the distinct items of each user in the order of first sampling."""
        wanted = self.num_events(user)
        offsets = offsets_of(wanted)
        item = np.full(offsets[-1], -1)
        main, second = self.interests(user)
        todo = np.arange(len(user))
        draws = wanted + wanted // 2 + 4
        for _ in range(12):  # twice the draws for those still short; the first ones stay the same
            owner = np.repeat(todo, draws[todo])
            drawn = self._draw(user, main, second, owner, _count_up(draws[todo]))
            _, first = np.unique(owner * self.options.items + drawn, return_index=True)
            first.sort()
            owner, drawn = owner[first], drawn[first]
            got = np.bincount(owner, minlength=len(user))[todo]
            position = _count_up(got)
            kept = position < wanted[owner]
            item[offsets[owner[kept]] + position[kept]] = drawn[kept]
            todo = todo[got < wanted[todo]]
            if not len(todo):
                break
            draws[todo] *= 2
        else:  # the catalogue is exhausted: these users keep the items found so far
            found = item >= 0
            offsets = np.append(0, np.cumsum(found))[offsets]
            item = item[found]
        return Events(user, offsets, item)

    def _draw(
        self, user: np.ndarray, main: np.ndarray, second: np.ndarray, owner: np.ndarray, draw: np.ndarray
    ) -> np.ndarray:
        """Return the item of each draw of each owner, repeats included."""
        point = self.chance("draw", user[owner], draw)
        is_main = point < MAIN_SHARE
        is_second = ~is_main & (point < MAIN_SHARE + SECOND_SHARE)
        part = np.where(is_main, 0, np.where(is_second, 1, 2))
        low = np.array([0.0, MAIN_SHARE, MAIN_SHARE + SECOND_SHARE])[part]
        share = np.array([MAIN_SHARE, SECOND_SHARE, GLOBAL_SHARE])[part]
        cluster = np.where(is_main, main[owner], np.where(is_second, second[owner], self.options.clusters))
        at = np.searchsorted(self._edges, cluster + (point - low) / share, side="right")
        items = self.options.items
        return np.where(at >= items, np.minimum(at - items, items - 1), at)

    @cached_property
    def by_global_share(self) -> np.ndarray:
        """Return all items, the most popular first."""
        return np.argsort(-self.global_share, kind="stable")

    def probability(self, item: np.ndarray, main: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return P(item | user) for arrays that broadcast, with seen items included."""
        cluster = self.cluster_of[item]
        weight = MAIN_SHARE * (cluster == main) + SECOND_SHARE * (cluster == second)
        weight = weight + GLOBAL_SHARE * self.cluster_popularity[cluster]
        return self.share_in_cluster[item] * weight

    def tables(self, events: Events) -> dict[str, pa.Table]:
        """Return the train, valid and test rows of these users; a split without rows is omitted."""
        owner, starts, ends = events.owner, events.offsets[:-1], events.offsets[1:]
        user_id = self.user_id(events.user)
        item_id = self.item_id[events.item]
        context = {"timestamp": self._timestamps(events), "device": self._devices(events)}

        def rows(event: np.ndarray, history_starts: np.ndarray, positive: dict[str, Any]) -> pa.Table:
            columns = {"user_id": user_id[owner[event]], **positive}
            columns |= {name: column.take(pa.array(event)) for name, column in context.items()}
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
        """Return times in seconds; the gap between events of a user is at least a minute, two days on average."""
        user = events.user[events.owner]
        wait = -np.log1p(-self.chance("gap", user, _count_up(np.diff(events.offsets))))
        gap = 60 + (172_800 * wait).astype(np.int64)
        passed = np.append(0, np.cumsum(gap))
        passed = passed[1:] - passed[events.offsets[:-1]][events.owner]
        start = FIRST_TIME + (180 * 86_400 * self.chance("start", events.user)).astype(np.int64)
        return pa.array(start[events.owner] + passed)

    def _devices(self, events: Events) -> pa.Array:
        """Return devices. Each user has a favourite, mostly that of the main cluster, and uses it in 80 % of events."""
        main, _ = self.interests(events.user)
        favourite = self._mostly("device", events.user, main, len(DEVICES), 0.7)
        user = events.user[events.owner]
        point = self.chance("device used", user, _count_up(np.diff(events.offsets)))
        other = ((point - 0.8) * 5 * len(DEVICES)).astype(np.int64)
        return _words(DEVICES, np.where(point < 0.8, favourite[events.owner], other))

    def _mostly(self, what: str, user: np.ndarray, main: np.ndarray, choices: int, share: float) -> np.ndarray:
        """Return the main cluster's choice with probability `share`, else a random one, mostly of the first ones."""
        home = (self.chance(f"{what} of cluster", main) ** 1.5 * choices).astype(np.int64)
        drawn = (self.chance(f"{what} otherwise", user) ** 2 * choices).astype(np.int64)
        return np.where(self.chance(f"{what} is usual", user) < share, home, drawn)

    def user_id(self, user: np.ndarray) -> np.ndarray:
        return self._sparse_id("user id", user)

    def user_table(self, user: np.ndarray) -> pa.Table:
        """Return user_id, country and age; the last two depend on the main cluster and are sometimes null."""
        main, _ = self.interests(user)
        country = self._mostly("country", user, main, self.options.countries, 0.5)
        centre = 22 + 40 * self.chance("age of cluster", main)
        age = np.clip(np.rint(centre + 7 * self._bell("age", user)), 16, 90)
        country_known = self.chance("country known", user) >= 0.03
        age_known = self.chance("age known", user) >= 0.05
        return pa.table(
            {
                "user_id": self.user_id(user),
                "country": _words(COUNTRIES, country, country_known),
                "age": pa.array(age, pa.float32(), mask=~age_known),
            }
        )

    def catalogue(self, items_per_piece: int = 65_536) -> Iterator[pa.Table]:
        """Yield the items ordered by item_id, so that the position in the file is independent of the cluster."""
        order = np.argsort(self.item_id)
        for start in range(0, len(order), items_per_piece):
            item = order[start : start + items_per_piece]
            yield self._item_table(item, np.arange(start, start + len(item)))

    def _item_table(self, item: np.ndarray, place: np.ndarray) -> pa.Table:
        cluster = self.cluster_of[item]
        adjective = _words(ADJECTIVES, (self.chance("adjective", item) * len(ADJECTIVES)).astype(int))
        number = pc.utf8_lpad(pa.array(place).cast(pa.string()), width=4, padding="0")
        level = np.exp(2 + 3 * self.chance("price of cluster", cluster))
        price = np.maximum(0.01, np.rint(100 * level * np.exp(0.4 * self._bell("price", item))) / 100)
        price_known = self.chance("price known", item) >= 0.03
        return pa.table(
            {
                "item_id": self.item_id[item],
                "title": pc.binary_join_element_wise(adjective, _words(self._nouns, cluster), number, " "),
                "category": _words(self._categories, cluster),
                "tags": self._tag_lists(item, cluster),
                "price": pa.array(price, pa.float32(), mask=~price_known),
            }
        )

    def _tag_lists(self, item: np.ndarray, cluster: np.ndarray) -> pa.ListArray:
        """Return 2 to 4 of the cluster's tags, one of them possibly from another cluster; 4 % of items have none."""
        position = np.arange(NUM_TAGS)
        likes = self.chance("tag", item[:, None], position[None, :])
        tag = cluster[:, None] * NUM_TAGS + np.argsort(likes, axis=1)
        count = 2 + (3 * self.chance("tags", item)).astype(np.int64)
        anything = (self.chance("stray tag", item) * self.options.clusters * NUM_TAGS).astype(np.int64)
        strays = np.flatnonzero((self.chance("tag strays", item) < 0.15) & (anything // NUM_TAGS != cluster))
        tag[strays, count[strays] - 1] = anything[strays]
        count[self.chance("no tags", item) < 0.04] = 0
        starts = np.arange(len(item)) * NUM_TAGS
        lists = list_column(tag.reshape(-1), starts, starts + count)
        return pa.ListArray.from_arrays(lists.offsets, _words(sum(self._tags, ()), lists.values.to_numpy()))

    def _bell(self, what: str, number: np.ndarray) -> np.ndarray:
        """Return standard normal numbers (Box and Muller 1958)."""
        radius = np.sqrt(-2 * np.log1p(-self.chance(f"{what}, radius", number)))
        return radius * np.cos(2 * np.pi * self.chance(f"{what}, angle", number))

    def _sparse_id(self, what: str, number: np.ndarray) -> np.ndarray:
        """Return sparse 63-bit ids, a different one for every number: each step is invertible."""
        self.chance(what, number[:1])
        bits = (number.astype(np.uint64) ^ self._salts[what]) & _MASK_63
        for factor in SPLITMIX_FACTORS:
            bits = ((bits ^ (bits >> np.uint64(32))) * factor) & _MASK_63
        return (bits ^ (bits >> np.uint64(32))).astype(np.int64)


def _output(seed: np.ndarray | np.uint64, number: np.ndarray) -> np.ndarray:
    """Return the outputs of splitmix64 with these seeds; output 1 is the first."""
    return mix_array(seed + (number.astype(np.uint64) - np.uint64(1)) * SPLITMIX_STEP)


def _apportion(total: int, weight: np.ndarray) -> np.ndarray:
    """Divide `total` in proportion to `weight`, at least 1 each; the largest remainders are rounded up."""
    exact = (total - len(weight)) * weight / weight.sum()
    share = np.floor(exact).astype(np.int64)
    short = total - len(weight) - int(share.sum())
    share[np.argsort(share - exact, kind="stable")[:short]] += 1
    return share + 1


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... for each length: [2, 3] -> [0, 1, 0, 1, 2]."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)


def _words(words: Any, number: np.ndarray, known: np.ndarray | None = None) -> pa.Array:
    """Return words[number] as a column of strings, null where it is not known."""
    mask = None if known is None else ~known
    return pa.array(list(words), pa.string()).take(pa.array(number, pa.int32(), mask=mask))
