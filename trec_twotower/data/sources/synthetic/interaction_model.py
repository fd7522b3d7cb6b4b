"""The interaction model of the synthetic dataset: every preference, and so the best reachable recall, is known.

Items belong to clusters. Within a cluster, the weight of an item is a power law of its rank, times a factor for the
distance of its price level from the user's, times a factor for each of its tags that has the user's style:

    p(item | cluster, user) ~ 1 / rank * LEVEL_WEIGHT[|level - user's|] * STYLE_WEIGHT ** (tags of the user's style)

A user's events form sessions. The first item of a session comes from the user's main cluster with share .6, from a
second cluster with .25 and from any cluster by popularity with .15, each multiplied by the cluster's affinity to the
time of day:

    w(cluster) ~ (.6 [main] + .25 [second] + .15 popularity(cluster)) * affinity(cluster, daypart)

A later event of a session repeats the cluster of the session's first item with share SESSION_SHARE, and otherwise
follows w again. An item that the user has already is drawn again, so each event follows its law restricted to the
unseen items. New items are drawn in the last two events only, which are held out: nothing but their content is known in
training.

Every number is a function of the seed and of its purpose (which user, which event): pieces of any size give the same
dataset, in constant memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from trec_twotower.data.sources.synthetic.chance import Chance
from trec_twotower.data.sources.synthetic.options import MIN_EVENTS, Options
from trec_twotower.data.sources.synthetic.words import NUM_TAGS
from trec_twotower.ops.ragged import offsets_of

MAIN_SHARE, SECOND_SHARE, GLOBAL_SHARE = 0.7, 0.22, 0.08
SESSION_SHARE = 0.9  # share of later events of a session in the cluster of its first item
SESSION_EVENTS = 3.0  # mean number of events of a session
DAYPARTS = 4  # of six hours: night, morning, afternoon, evening
PEAK, OFF_PEAK = 3.0, 0.5  # affinity of a cluster to its own daypart and to the others
LEVEL_WEIGHT = np.array([1.0, 0.35, 0.12])  # by the distance between the price levels of item and user
LEVELS = len(LEVEL_WEIGHT)
STYLES = 3  # a tag's style is its position among the cluster's tags, modulo STYLES
STYLE_WEIGHT = 1.6
ITEM_EXPONENT = 1.0  # exponent of the popularity by rank within a cluster
CLUSTER_EXPONENT = 0.5  # exponent of the popularity by rank among clusters
SIZE_EXPONENT = 0.3  # exponent of the number of items by rank among clusters
MAX_ATTEMPTS = 1024  # draws of an unseen item; a user whose draws all fail has no further events
_ATTEMPT = 1 << 24  # stride of the draw numbers of an attempt


@dataclass(frozen=True)
class Users:
    """What determines the preferences of some users, (users,) each."""

    number: np.ndarray
    main: np.ndarray  # clusters
    second: np.ndarray
    level: np.ndarray  # price level, 0 to LEVELS - 1
    style: np.ndarray  # 0 to STYLES - 1

    def take(self, rows: np.ndarray) -> Users:
        return Users(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Situation:
    """What determines the law of an event in addition to the user, (events,) each."""

    starts: np.ndarray  # whether the event is the first of a session
    focus: np.ndarray  # cluster of the session's first item; -1 for the first event
    daypart: np.ndarray
    has_new: np.ndarray  # whether new items can be drawn

    def take(self, rows: np.ndarray) -> Situation:
        return Situation(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Events:
    """The interactions of some users in order: those of user r are `item[offsets[r] : offsets[r + 1]]`."""

    user: np.ndarray  # the users' numbers
    offsets: np.ndarray
    item: np.ndarray  # the items' numbers
    situation: Situation

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
        of_kept = kept[self.owner]
        offsets = offsets_of(np.diff(self.offsets)[kept])
        return Events(self.user[kept], offsets, self.item[of_kept], self.situation.take(of_kept))


class InteractionModel:
    """The distribution of interactions. Users and items are numbered from 0; items are sorted by cluster and rank."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.chance = Chance(options.seed)
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
        peak = (DAYPARTS * self.chance("daypart of cluster", clusters)).astype(np.int64)
        self.affinity = np.where(np.arange(DAYPARTS) == peak[:, None], PEAK, OFF_PEAK)  # (clusters, DAYPARTS)

        item = np.arange(options.items)
        self.cluster_of = np.repeat(clusters, size)
        rank = item - self.cluster_starts[self.cluster_of]
        self.item_level = (LEVELS * self.chance("price level", item)).astype(np.int64)
        self.is_new = (self.chance("new", item) < options.new_items) & (rank > 0)
        self._falling = (rank + 1.0) ** -ITEM_EXPONENT
        self._global_edges = np.cumsum(self.cluster_popularity[:, None] * self.affinity, axis=0).T.copy()

    def users(self, number: np.ndarray) -> Users:
        main, second = self._interests(number)
        level = (LEVELS * self.chance("budget", number)).astype(np.int64)
        return Users(number, main, second, level, (STYLES * self.chance("style", number)).astype(np.int64))

    def _interests(self, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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

    def tag_positions(self, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the cluster's tags in each item's own order (items, NUM_TAGS), and how many of them it has."""
        likes = self.chance("tag", item[:, None], np.arange(NUM_TAGS)[None, :])
        count = 2 + (3 * self.chance("tags", item)).astype(np.int64)
        return np.argsort(likes, axis=1), np.where(self.chance("no tags", item) < 0.04, 0, count)

    @cached_property
    def _style_tags(self) -> np.ndarray:
        """Return the number of tags of each style, (STYLES, items)."""
        position, count = self.tag_positions(np.arange(self.options.items))
        has = np.arange(NUM_TAGS) < count[:, None]
        return np.stack([(has & (position % STYLES == style)).sum(axis=1) for style in range(STYLES)])

    def share_in_cluster(self, level: int, style: int, has_new: bool) -> np.ndarray:
        """Return p(item | cluster, user) of all items, (items,): each cluster's sum is 1."""
        weight = self._falling * LEVEL_WEIGHT[np.abs(self.item_level - level)]
        weight = weight * STYLE_WEIGHT ** self._style_tags[style]
        weight = weight if has_new else np.where(self.is_new, 0.0, weight)
        return weight / np.bincount(self.cluster_of, weight)[self.cluster_of]

    @cached_property
    def _edges(self) -> np.ndarray:
        """Return the upper ends of the items' ranges: of cluster c and law n they lie in [n C + c, n C + c + 1).

        Law n is that of a level, a style and whether new items can be drawn; see `_law`.
        """
        parts = []
        for law in range(2 * LEVELS * STYLES):
            share = self.share_in_cluster(law // 2 // STYLES, law // 2 % STYLES, bool(law % 2))
            running = np.append(0.0, np.cumsum(share))
            within = running[1:] - running[self.cluster_starts[self.cluster_of]]
            within[self.cluster_starts[1:] - 1] = 1.0
            parts.append(law * self.options.clusters + self.cluster_of + within)
        return np.concatenate(parts)

    def events(self, number: np.ndarray) -> Events:
        """Return the distinct items of each user in order."""
        users, wanted = self.users(number), self.num_events(number)
        planned, most = wanted.copy(), int(wanted.max(initial=0))
        shape = (len(number), most)
        item, focus, daypart = np.full(shape, -1), np.full(shape, -1), np.zeros(shape, np.int64)
        starts, has_new = np.zeros(shape, bool), np.zeros(shape, bool)
        session = np.full(len(number), -1)
        for event in range(most):
            rows = np.flatnonzero(wanted > event)
            starts[rows, event] = (self.chance("session", number[rows], event) < 1 / SESSION_EVENTS) | (event == 0)
            drawn = (DAYPARTS * self.chance("daypart", number[rows], event)).astype(np.int64)
            before = daypart[rows, event - 1] if event else drawn
            daypart[rows, event] = np.where(starts[rows, event], drawn, before)
            focus[rows, event] = np.where(starts[rows, event], -1, session[rows])
            has_new[rows, event] = (event >= planned[rows] - 2) & (planned[rows] >= MIN_EVENTS)
            for attempt in range(MAX_ATTEMPTS):
                situation = Situation(*(each[rows, event] for each in (starts, focus, daypart, has_new)))
                found = self._draw(users.take(rows), situation, event + attempt * _ATTEMPT)
                item[rows, event] = found
                rows = rows[(item[rows, :event] == found[:, None]).any(axis=1)]
                if not len(rows):
                    break
            wanted[rows] = event
            session = np.where(starts[:, event], self.cluster_of[item[:, event]], session)
        exists = np.arange(most) < wanted[:, None]
        situation = Situation(*(each[exists] for each in (starts, focus, daypart, has_new)))
        return Events(number, offsets_of(wanted), item[exists], situation)

    def _draw(self, users: Users, situation: Situation, draw: int) -> np.ndarray:
        """Return an item of each user, which the user may have already."""
        clusters = self.options.clusters
        weight = self._component_weights(users, situation.daypart)  # (users, 3)
        point = self.chance("component", users.number, draw) * weight.sum(axis=1)
        edges = self._global_edges[situation.daypart, -1] * self.chance("cluster", users.number, draw)
        anything = np.empty(len(users.number), np.int64)
        for daypart in range(DAYPARTS):
            mine = situation.daypart == daypart
            anything[mine] = np.searchsorted(self._global_edges[daypart], edges[mine], side="right")
        anything = np.minimum(anything, clusters - 1)
        is_main, is_second = point < weight[:, 0], point < weight[:, 0] + weight[:, 1]
        cluster = np.where(is_main, users.main, np.where(is_second, users.second, anything))
        stays = ~situation.starts & (self.chance("stay", users.number, draw) < SESSION_SHARE)
        cluster = np.where(stays, situation.focus, cluster)
        law = 2 * (users.level * STYLES + users.style) + situation.has_new
        place = law * clusters + cluster + self.chance("item", users.number, draw)
        return np.minimum(np.searchsorted(self._edges, place, side="right"), len(self._edges) - 1) % self.options.items

    def _component_weights(self, users: Users, daypart: np.ndarray) -> np.ndarray:
        """Return the weights of the main cluster, the second and any cluster, (users, 3), not normalized."""
        total = self.cluster_popularity @ self.affinity  # (DAYPARTS,)
        return np.stack(
            [
                MAIN_SHARE * self.affinity[users.main, daypart],
                SECOND_SHARE * self.affinity[users.second, daypart],
                GLOBAL_SHARE * total[daypart],
            ],
            axis=1,
        )

    def cluster_law(self, users: Users, situation: Situation) -> np.ndarray:
        """Return the probability of each cluster for the next item, (users, clusters), with seen items included."""
        row = np.arange(len(users.number))
        law = GLOBAL_SHARE * self.cluster_popularity * self.affinity.T[situation.daypart]
        law[row, users.main] += MAIN_SHARE * self.affinity[users.main, situation.daypart]
        law[row, users.second] += SECOND_SHARE * self.affinity[users.second, situation.daypart]
        law /= law.sum(axis=1, keepdims=True)
        later = np.flatnonzero(~situation.starts)
        law[later] *= 1 - SESSION_SHARE
        law[later, situation.focus[later]] += SESSION_SHARE
        return law

    def probabilities(self, users: Users, situation: Situation) -> np.ndarray:
        """Return P(next item | user, situation) of every item, (users, items), with seen items included."""
        law_BC = self.cluster_law(users, situation)
        found = np.empty((len(users.number), self.options.items))
        kind = 2 * (users.level * STYLES + users.style) + situation.has_new
        for law in np.unique(kind):
            share = self.share_in_cluster(int(law) // 2 // STYLES, int(law) // 2 % STYLES, bool(law % 2))
            mine = np.flatnonzero(kind == law)
            found[mine] = law_BC[np.ix_(mine, self.cluster_of)] * share
        return found


def _apportion(total: int, weight: np.ndarray) -> np.ndarray:
    """Divide `total` in proportion to `weight`, at least 1 each; the largest remainders are rounded up."""
    exact = (total - len(weight)) * weight / weight.sum()
    share = np.floor(exact).astype(np.int64)
    short = total - len(weight) - int(share.sum())
    share[np.argsort(share - exact, kind="stable")[:short]] += 1
    return share + 1
