"""The training rows in their order, as batches; and the held-out rows to evaluate on.

The order is a function of (seed, epoch, global row): row groups are permuted, joined into windows of about
`shuffle_rows` rows, and each window is permuted. A step takes the next `batch_size` rows of that order, of which each
rank takes its share; so the batches are the same for any number of ranks, and a cursor is one integer, the step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trec_twotower.config import DataConfig, LossConfig
from trec_twotower.data.batch import Batch, Candidates, Targets, make_batch
from trec_twotower.data.catalogue import Catalogue, check_side
from trec_twotower.data.dataset import HISTORY, ITEM_ID, POSITIVES, USER_ID, Dataset, RowGroup, Split
from trec_twotower.data.hashing import uniform
from trec_twotower.data.lists import Lists
from trec_twotower.data.negatives import InclusionProbability, sampled_items
from trec_twotower.data.transforms import (
    Columns,
    Statistics,
    check_kind,
    key_lists,
    learn_statistics,
    one_chunk,
    transform,
)
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.schema import FeatureSpec, Schema

WEIGHT = "weight"
_ORDER, _INPUT = 0x6F72, 0x696E  # streams of random numbers that must not meet


class Sources:
    """A dataset seen through a schema: where each feature comes from, checked; catalogue and users in memory."""

    def __init__(
        self, dataset: Dataset, schema: Schema, rows: str, statistics: Mapping[str, Statistics] | None = None
    ) -> None:
        self.dataset = dataset
        self.schema = schema
        self.rows = rows
        self.context, self.static = self._placed()
        check_side(list(schema.item), dataset.items)
        self._check_targets()
        self.statistics = dict(statistics) if statistics is not None else self.learn()
        items = {feature.name: self.statistics[f"item:{feature.name}"] for feature in schema.numbers("item")}
        self.catalogue = Catalogue(dataset.items, ITEM_ID, list(schema.item), schema.tables, items)
        self.users = None
        if self.static:
            assert dataset.users is not None
            self.users = Catalogue(dataset.users, USER_ID, self.static, schema.tables, self._user_statistics)

    @property
    def _user_statistics(self) -> dict[str, Statistics]:
        return {feature.name: self.statistics[f"user:{feature.name}"] for feature in self.schema.numbers("user")}

    def _placed(self) -> tuple[list[FeatureSpec], list[FeatureSpec]]:
        """The user features that stand in the rows, and those that stand in users/."""
        train, users = self.dataset.train, self.dataset.users
        context, static = [], []
        for feature in self.schema.user:
            if train.has(feature.reads) or self._is_drawn(feature.reads):
                context.append(feature)
                if not self._is_drawn(feature.reads):
                    check_side([feature], train)
                elif feature.kind != "bag" or feature.weights:
                    raise ConfigError(
                        f"user feature {feature.name!r} reads {HISTORY!r}, which is drawn here: make it a bag without "
                        "weights."
                    )
            elif users is not None and users.has(feature.reads) and feature.reads != USER_ID:
                static.append(feature)
                check_side([feature], users)
            else:
                known = [*train.columns, *(users.columns if users is not None else [])]
                raise ConfigError(
                    f"user feature {feature.name!r} reads column {feature.reads!r}, which neither {train.folder} nor "
                    f"users/ has{nearest(feature.reads, known)}: correct the config, or write the column."
                )
        return context, static

    def _is_drawn(self, column: str) -> bool:
        """With a row per user the history is a part of the row's own positives."""
        return self.rows == "user" and column == HISTORY

    def _check_targets(self) -> None:
        train = self.dataset.train
        wanted, other = (POSITIVES, "event") if self.rows == "user" else (ITEM_ID, "user")
        if not train.has(wanted):
            raise ConfigError(
                f"data.rows is {self.rows!r}, which needs the column {wanted!r} in {train.folder}, but its columns are "
                f"{', '.join(train.columns)}: set data.rows: {other}, or write {wanted!r}."
            )

    def learn(self) -> dict[str, Statistics]:
        """One pass over the number columns of train, users/ and items/."""
        found = {}
        places: list[tuple[str, list[FeatureSpec], Split | None]] = [
            ("item", list(self.schema.item), self.dataset.items),
            ("user", self.context, self.dataset.train),
            ("user", self.static, self.dataset.users),
        ]
        for side, features, split in places:
            for feature in features:
                if not feature.is_sparse and split is not None:
                    found[f"{side}:{feature.name}"] = learn_statistics(
                        feature,
                        (
                            (one_chunk(table[feature.reads]), f"{group}, column {feature.reads!r}")
                            for group, table in split.tables([feature.reads])
                        ),
                    )
        return found

    def user_columns(self) -> list[str]:
        """The columns of a row that user_features reads."""
        reads = {feature.reads for feature in self.context} | {
            feature.weights for feature in self.context if feature.weights
        }
        return sorted({USER_ID, *reads})

    def user_features(self, table: pa.Table, where: str, given: Mapping[str, Lists] | None = None) -> Columns:
        """The features of the users of these rows: from the row itself, and from users/ by user_id."""
        tables, statistics = self.schema.tables, self._user_statistics
        columns = transform(self.context, tables, statistics, table, where, given)
        if self.users is None:
            return columns
        ids = one_chunk(table[USER_ID])
        rows = self.users.rows_of(ids, f"{where}, column {USER_ID!r}")
        if (rows < 0).any():
            first = int(np.flatnonzero(rows < 0)[0])
            raise DataError(
                f"{where}: user {ids[first].as_py()!r} is not in {self.users.split.folder} ({int((rows < 0).sum()):,} "
                "rows name such users): write a row for each user there."
            )
        return columns.beside(self.users.columns.take(rows))

    def item_rows(self, ids: pa.Array, where: str) -> np.ndarray:
        """The catalogue row of each item; an unknown item is a DataError."""
        rows = self.catalogue.rows_of(ids, where)
        if (rows < 0).any():
            first = int(np.flatnonzero(rows < 0)[0])
            raise self._unknown(ids[first].as_py(), int((rows < 0).sum()), where)
        return rows

    def _unknown(self, item: object, count: int, where: str) -> DataError:
        return DataError(
            f"{where}: item {item!r} is not in the catalogue {self.dataset.items.folder} ({count:,} entries name such "
            "items): add it there, or leave these rows out."
        )

    def item_row_lists(self, lists: pa.Array, where: str, *, known_only: bool = False) -> Lists:
        """Catalogue rows of lists of items; with `known_only`, items outside the catalogue are left out."""
        rows = self.catalogue.rows_of_lists(lists, where)
        unknown = rows.values < 0
        if unknown.any():
            if known_only:
                return rows.where(~unknown)
            row = int(rows.rows[unknown][0])
            item = lists.flatten().drop_null()[int(unknown.argmax())].as_py()
            raise self._unknown(item, int(unknown.sum()), f"{where}, row {row:,}")
        return rows

    def item_counts(self) -> np.ndarray:
        """How often each item of the catalogue was taken in train (int64)."""
        train = self.dataset.train
        column = POSITIVES if self.rows == "user" else ITEM_ID
        counts = np.zeros(len(self.catalogue), np.int64)
        for group, table in train.tables([column]):
            array, where = one_chunk(table[column]), f"{group}, column {column!r}"
            rows = self.item_row_lists(array, where).values if self.rows == "user" else self.item_rows(array, where)
            counts += np.bincount(rows, minlength=len(counts))
        return counts


@dataclass(frozen=True)
class Examples:
    """Some training rows, decoded and hashed."""

    user: Columns
    positives: Lists  # catalogue rows
    known: Lists  # catalogue rows that are no negatives: the positives, and the history
    weight: np.ndarray  # float32, one a row

    def take(self, rows: np.ndarray) -> Examples:
        return Examples(self.user.take(rows), self.positives.take(rows), self.known.take(rows), self.weight[rows])

    @staticmethod
    def concat(parts: list[Examples]) -> Examples:
        if len(parts) == 1:
            return parts[0]
        return Examples(
            Columns.concat([part.user for part in parts]),
            Lists.concat([part.positives for part in parts]),
            Lists.concat([part.known for part in parts]),
            np.concatenate([part.weight for part in parts]),
        )


@dataclass(frozen=True)
class Window:
    """Row groups that are permuted together; its rows take the places first .. first + num_rows of the epoch."""

    number: int
    groups: tuple[RowGroup, ...]
    first: int
    num_rows: int


class TrainBatches:
    """The batches of this rank from any step on: `batches.since(step)`."""

    def __init__(
        self,
        sources: Sources,
        data: DataConfig,
        loss: LossConfig,
        count_I: np.ndarray,
        share: tuple[int, int],
    ) -> None:
        self.sources = sources
        self.data = data
        self.loss = loss
        self.rank, self.num_ranks = share
        self.num_rows = sources.dataset.train.num_rows
        if data.batch_size > self.num_rows:
            raise ConfigError(
                f"data.batch_size is {data.batch_size:,}, but {sources.dataset.train.folder} has only "
                f"{self.num_rows:,} rows: set it to {self.num_rows:,} or less."
            )
        self.steps_per_epoch = -(-self.num_rows // data.batch_size)
        per_row = count_I.sum() / self.num_rows * (1 - data.input_share if data.rows == "user" else 1)
        negatives = loss.negatives
        self.log_q_I = InclusionProbability(negatives, count_I, per_row * data.batch_size).log_I * np.float32(
            loss.log_q
        )

    def since(self, step: int, end: int) -> Iterator[Batch]:
        """Batches of the steps step .. end - 1, made by a thread that runs ahead by `data.prefetch`."""
        made: queue.Queue[Batch | BaseException | None] = queue.Queue(self.data.prefetch)
        stop = threading.Event()

        def make() -> None:
            try:
                for batch in self._make(step, end):
                    if not _put(made, batch, stop):
                        return
                _put(made, None, stop)
            except BaseException as error:  # the trainer raises it, where it belongs
                _put(made, error, stop)

        thread = threading.Thread(target=make, name="batches", daemon=True)
        thread.start()
        try:
            while (batch := made.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            thread.join()

    def _make(self, step: int, end: int) -> Iterator[Batch]:
        while step < end:
            epoch, start = divmod(step, self.steps_per_epoch)
            stop = min(self.steps_per_epoch, start + end - step)
            for parts, mine in self._epoch(epoch, start, stop):
                yield self._batch(step, parts, mine)
                step += 1

    def _epoch(self, epoch: int, start: int, stop: int) -> Iterator[tuple[list[tuple[Examples, np.ndarray]], slice]]:
        """For each step of an epoch: the rows of all ranks, as (examples, rows of them), and which are this rank's."""
        waiting = iter(self.windows(epoch))
        held: list[tuple[Window, Examples, np.ndarray]] = []
        for step in range(start, stop):
            low = step * self.data.batch_size
            high = min(low + self.data.batch_size, self.num_rows)
            held = [entry for entry in held if entry[0].first + entry[0].num_rows > low]
            while not held or held[-1][0].first + held[-1][0].num_rows < high:
                window = next(waiting)
                if window.first + window.num_rows > low:
                    held.append((window, self.read(window, epoch), self._permutation(epoch, window)))
            parts = [
                (examples, order[max(low - window.first, 0) : high - window.first]) for window, examples, order in held
            ]
            yield parts, _share(high - low, self.rank, self.num_ranks)

    def windows(self, epoch: int) -> list[Window]:
        """The epoch's windows, in order."""
        groups = self.sources.dataset.train.row_groups
        order = self._random(epoch, 0).permutation(len(groups))
        windows: list[Window] = []
        waiting: list[RowGroup] = []
        first = 0
        for position, number in enumerate(order):
            waiting.append(groups[number])
            num_rows = sum(group.num_rows for group in waiting)
            if num_rows >= self.data.shuffle_rows or position == len(order) - 1:
                windows.append(Window(len(windows), tuple(waiting), first, num_rows))
                first, waiting = first + num_rows, []
        return windows

    def _permutation(self, epoch: int, window: Window) -> np.ndarray:
        return self._random(epoch, window.number + 1).permutation(window.num_rows)

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.data.seed, _ORDER], counter=[0, 0, epoch, stream]))

    def read(self, window: Window, epoch: int) -> Examples:
        """A window's rows, in the order of the files."""
        return Examples.concat([self._read_group(group, epoch) for group in window.groups])

    def _read_group(self, group: RowGroup, epoch: int) -> Examples:
        sources, train = self.sources, self.sources.dataset.train
        columns = set(sources.user_columns())
        if self.data.rows == "user":
            columns = (columns | {POSITIVES}) - ({HISTORY} if not train.has(HISTORY) else set())
        else:
            columns |= {ITEM_ID}
        masks_history = self.loss.mask_history and train.has(HISTORY) and self.data.rows == "event"
        columns |= ({HISTORY} if masks_history else set()) | ({WEIGHT} if train.has(WEIGHT) else set())
        table = train.read(group, sorted(columns))
        where = str(group)
        weight = self._weights(table, where)
        if self.data.rows == "user":
            return self._read_users(table, where, group, epoch, weight)
        positives = Lists.singles(sources.item_rows(one_chunk(table[ITEM_ID]), f"{where}, column {ITEM_ID!r}"))
        known = positives
        if masks_history:
            history = sources.item_row_lists(one_chunk(table[HISTORY]), f"{where}, column {HISTORY!r}", known_only=True)
            known = side_by_side(positives, history)
        return Examples(sources.user_features(table, where), positives, known, weight)

    def _read_users(self, table: pa.Table, where: str, group: RowGroup, epoch: int, weight: np.ndarray) -> Examples:
        """A row per user: part of the items is input, the rest are the positives; drawn anew each epoch."""
        array = one_chunk(table[POSITIVES])
        rows = self.sources.item_row_lists(array, f"{where}, column {POSITIVES!r}")
        keys = key_lists(array, where)
        global_row = group.first_row + keys.rows
        # By the item and not by its place in the list: an item that stands there twice falls on one side.
        draw = uniform(_INPUT, self.data.seed, epoch, global_row, keys.values)
        is_input = draw_inputs(keys, draw, self.data.input_share)
        user = self.sources.user_features(table, where, {HISTORY: keys.where(is_input)})
        known = rows if self.loss.mask_history else rows.where(~is_input)
        return Examples(user, rows.where(~is_input), known, weight)

    def _weights(self, table: pa.Table, where: str) -> np.ndarray:
        if WEIGHT not in table.column_names:
            return np.ones(table.num_rows, np.float32)
        array = one_chunk(table[WEIGHT])
        check_kind(FeatureSpec(name=WEIGHT, kind="number"), array.type, where)
        weight = array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
        if bad.size:
            raise DataError(
                f"{where}, column {WEIGHT!r}, row {bad[0]:,}: {weight[bad[0]]}: weights are finite and at least 0."
            )
        return weight

    def _batch(self, step: int, parts: list[tuple[Examples, np.ndarray]], mine: slice) -> Batch:
        """This rank's batch of a step, whose candidates come from the rows of all ranks."""
        taken = np.concatenate([examples.positives.take(rows).values for examples, rows in parts])
        num_rows = sum(len(rows) for _, rows in parts)
        candidates = self._candidates(step, taken)
        first = sum(candidates.sizes[: self.rank])
        share = candidates.item_row[first : first + candidates.sizes[self.rank]]
        examples = _rows_between(parts, mine.start, mine.stop)
        lengths = examples.positives.lengths
        each = examples.weight * np.maximum(lengths, 1).astype(np.float32) ** -self.loss.positive_power
        largest = max(-(-num_rows // self.num_ranks), *candidates.sizes)
        return make_batch(
            self.sources.schema,
            examples.user,
            self.sources.catalogue.columns.take(share),
            num_rows=largest,
            candidates=candidates,
            targets=Targets(examples.positives, examples.known, np.repeat(each, lengths)),
            num_rows_of_all_ranks=num_rows,
        )

    def _candidates(self, step: int, taken: np.ndarray) -> Candidates:
        """The positives of all ranks and the step's sample, each item once."""
        negatives = self.loss.negatives
        drawn = sampled_items(negatives, len(self.sources.catalogue), self.data.seed, step)
        item_row = np.union1d(taken, drawn)
        is_negative = np.ones(len(item_row), bool) if negatives.in_batch else np.isin(item_row, drawn)
        shares = [_share(len(item_row), rank, self.num_ranks) for rank in range(self.num_ranks)]
        sizes = tuple(share.stop - share.start for share in shares)
        return Candidates(item_row, self.log_q_I[item_row], is_negative, sizes)


def _share(count: int, rank: int, num_ranks: int) -> slice:
    return slice(count * rank // num_ranks, count * (rank + 1) // num_ranks)


def _rows_between(parts: list[tuple[Examples, np.ndarray]], start: int, stop: int) -> Examples:
    """The examples start .. stop - 1 of all parts' rows laid end to end."""
    chosen, first = [], 0
    for examples, rows in parts:
        chosen.append(examples.take(rows[max(start - first, 0) : max(stop - first, 0)]))
        first += len(rows)
    return Examples.concat(chosen)


def draw_inputs(lists: Lists, draw: np.ndarray, share: float) -> np.ndarray:
    """Which values of each row are input (bool): those drawn below `share`, but at least one stays a target."""
    is_input = draw < share
    targets = np.bincount(lists.rows[~is_input], minlength=len(lists))
    for row in np.flatnonzero((targets == 0) & (lists.lengths > 0)):
        low, high = lists.offsets[row], lists.offsets[row + 1]
        is_input[low:high] = draw[low:high] < draw[low:high].max()
    return is_input


def side_by_side(first: Lists, second: Lists) -> Lists:
    """Each row of `first` followed by the same row of `second`."""
    both = Lists.concat([first, second])
    order = np.arange(2 * len(first)).reshape(2, -1).T.reshape(-1)
    mixed = both.take(order)
    return Lists(mixed.offsets[::2], mixed.values)


def _put(made: queue.Queue, thing: object, stop: threading.Event) -> bool:
    """Whether `thing` was taken before somebody said stop."""
    while not stop.is_set():
        try:
            made.put(thing, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


@dataclass(frozen=True)
class HeldOut:
    """The rows of valid/ or test/: who is asked about, what is to be found, and what is left out of the ranking."""

    user_ids: pa.Array
    user: Columns
    positives: Lists  # catalogue rows
    seen: Lists  # catalogue rows

    @classmethod
    def read(cls, sources: Sources, split_name: str, sample: int | None = None, seed: int = 0) -> HeldOut:
        """All rows, or a seeded sample of them. Rows without anything to find are left out."""
        split = sources.dataset.split(split_name)
        columns = set(sources.user_columns())
        for column in columns:
            split.require(column, "the user tower reads")
        single = not split.has(POSITIVES)
        if single:
            split.require(ITEM_ID, f"names what to find (there is no {POSITIVES!r} either)")
        columns |= {ITEM_ID if single else POSITIVES} | ({HISTORY} if split.has(HISTORY) else set())
        table = split.table(sorted(columns))
        where = str(split.folder)
        if single:
            positives = Lists.singles(sources.item_rows(one_chunk(table[ITEM_ID]), where))
        else:
            positives = sources.item_row_lists(one_chunk(table[POSITIVES]), where)
        keep = np.flatnonzero(positives.lengths > 0)
        if sample is not None and sample < len(keep):
            keep = np.sort(np.random.default_rng(seed).choice(keep, sample, replace=False))
        if not keep.size:
            raise DataError(f"{where}: no row has anything to find, so there is nothing to evaluate.")
        table = table.take(pa.array(keep)).combine_chunks()
        seen = Lists.empty(len(keep))
        if split.has(HISTORY):
            seen = sources.item_row_lists(one_chunk(table[HISTORY]), where, known_only=True)
        return cls(one_chunk(table[USER_ID]), sources.user_features(table, where), positives.take(keep), seen)

    def __len__(self) -> int:
        return len(self.positives)

    def part(self, rows: slice) -> HeldOut:
        numbers = np.arange(len(self))[rows]
        return HeldOut(
            self.user_ids.take(pa.array(numbers)),
            self.user.take(numbers),
            self.positives.take(numbers),
            self.seen.take(numbers),
        )
