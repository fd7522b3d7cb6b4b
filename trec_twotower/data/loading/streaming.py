"""Training rows pass by pass: the epochs of a dataset that stays as it is, or the generations of a folder that grows.

The files that stand in train/ when a run begins are its generation 0; those that have come when it is through are
generation 1, and so on. Each is read once, in the order of an epoch of that number, and its last step may be smaller.
A generation is in the run's stream.json before its first row is used, so a run that was cut short takes the same rows
in the same steps again, whatever has come meanwhile; a cursor is one integer, the step. Items and users that have come
are known from the next generation on.
"""

from __future__ import annotations

import io
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from trec_twotower.config.data import DataConfig, FollowConfig
from trec_twotower.config.losses import LossConfig
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.feature_report import own_items
from trec_twotower.data.loading.batch import Batch
from trec_twotower.data.loading.loader import HardNegativeProvider, TrainBatches, used_rows_per_epoch
from trec_twotower.data.loading.step_rows import StepRows
from trec_twotower.data.negatives.samplers import count_items
from trec_twotower.data.parquet_files import folder_of, parquet_files, refuse_partitions, refuse_tables, rows_if_whole
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import DataError
from trec_twotower.storage.atomic import read_json, write_file, write_json

PARTS = ("train", "items", "users")  # in this order: who writes rows of new items has written the items before
STREAM, COUNTS = "stream.json", "item_counts.npy"
COUNT_AGAIN = "remove it, and train counts again."
STOP_S = 1.0  # how long a rank that waits may take to notice that it is to stop


def never() -> bool:
    """Return False."""
    return False


def _sleep(seconds: float, is_stopped: Callable[[], bool]) -> bool:
    """Sleep; return True, and earlier, when the run is stopped."""
    while seconds > 0 and not is_stopped():
        time.sleep(min(seconds, STOP_S))
        seconds -= STOP_S
    return seconds > 0


class TrainData(Protocol):
    """Batches from any step on, and where a step stands among them."""

    @property
    def sources(self) -> FeatureDataset:
        """What the batch that came last is from."""

    @property
    def item_counts(self) -> np.ndarray | None:
        """How often each item of `sources.catalogue` is a positive, (I,); None before the first batch of a stream."""

    @property
    def num_steps(self) -> int:
        """As far as is known yet."""

    def since(
        self, step: int, lists_at: HardNegativeProvider | None = None, is_stopped: Callable[[], bool] = never
    ) -> Iterator[Batch]:
        """Yield the batches of this step and all later ones.

        `lists_at` is that of TrainBatches.since; `is_stopped` is asked by all ranks together while they wait for files.
        """

    def rows_before(self, step: int) -> int:
        """How many rows the steps before this one take, over all ranks."""

    def place(self, step: int) -> str:
        """The pass of the step before this one, in words."""

    def rows_of(self, step: int) -> list[StepRows]:
        """Where the rows of a step stand in the files; nothing where that is not known yet."""

    def is_end(self, step: int) -> bool:
        """Whether a pass ends before this step."""

    def is_over(self, step: int) -> bool:
        """Whether all ends before this step."""


class Epochs:
    """The batches of a dataset that stays as it is, so many times over."""

    def __init__(self, batches: TrainBatches, epochs: int) -> None:
        self.batches = batches
        self.epochs = epochs

    @property
    def sources(self) -> FeatureDataset:
        return self.batches.sources

    @property
    def item_counts(self) -> np.ndarray | None:
        return self.batches.item_counts

    @property
    def num_steps(self) -> int:
        return self.batches.steps_per_epoch * self.epochs

    def since(
        self, step: int, lists_at: HardNegativeProvider | None = None, is_stopped: Callable[[], bool] = never
    ) -> Iterator[Batch]:
        return self.batches.since(step, self.num_steps, lists_at)

    def rows_before(self, step: int) -> int:
        epoch, number = divmod(step, self.batches.steps_per_epoch)
        return epoch * self.batches.rows_per_epoch + number * self.batches.data.batch_size

    def place(self, step: int) -> str:
        return f"epoch {(step - 1) // self.batches.steps_per_epoch + 1}/{self.epochs}"

    def rows_of(self, step: int) -> list[StepRows]:
        return self.batches.rows_of(step)

    def is_end(self, step: int) -> bool:
        return step % self.batches.steps_per_epoch == 0

    def is_over(self, step: int) -> bool:
        return step == self.num_steps


@dataclass(frozen=True)
class Generation:
    """Files that were taken together."""

    files: dict[str, dict[str, int]]  # part of the dataset -> name -> bytes
    num_rows: int  # of those in train/

    def num_steps(self, data: DataConfig) -> int:
        return -(-used_rows_per_epoch(self.num_rows, data) // data.batch_size)

    def is_changed(self, folder: Path) -> bool:
        """Whether a file is gone or has another size."""
        for part, files in self.files.items():
            for name, size in files.items():
                path = folder / part / name
                if not path.is_file() or path.stat().st_size != size:
                    return True
        return False


class Generations:
    """The files of a folder that grows, in the order in which a run takes them."""

    def __init__(
        self, folder: Path | str, taken: tuple[Generation, ...], columns: dict[str, pa.DataType] | None = None
    ) -> None:
        self.folder = folder
        self.taken = taken
        self._columns = columns
        self.unreadable: set[str] = set()  # files that had no footer when they were last looked at

    @classmethod
    def begin(cls, data: DataConfig) -> Generations:
        """Of one generation, all that is there; raises DataError where that is no whole batch, or nothing at all."""
        Dataset.of(data)  # says what a folder lacks
        begun = cls(data.dataset, ()).with_new(data)
        if begun is None:
            wanted = f"{data.batch_size:,} rows (data.drop_last)" if data.drop_last else "a row"
            raise DataError(
                f"{data.dataset}/train has no whole Parquet files with {wanted} yet: start when there are some."
            )
        return begun

    @classmethod
    def read(cls, path: Path, folder: Path | str) -> Generations:
        """What `write` has written; raises DataError."""
        mend = "bring it back, or train into another run_dir."
        values = read_json(path, mend)
        try:
            return cls(folder, tuple(Generation(**value) for value in values["generations"]))
        except (TypeError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}): {mend}") from None

    def write(self, path: Path) -> None:
        write_json(path, {"generations": [asdict(generation) for generation in self.taken]})

    def with_new(self, data: DataConfig) -> Generations | None:
        """These and one more, of the whole files that have come since; None while they have no rows for a step."""
        found = {part: self._new_files(part) for part in PARTS}
        num_rows = sum(rows for _, rows in found["train"].values())
        if used_rows_per_epoch(num_rows, data) == 0:
            return None
        files = {part: {name: size for name, (size, _) in of_part.items()} for part, of_part in found.items()}
        return Generations(self.folder, (*self.taken, Generation(files, num_rows)), self._columns)

    def _new_files(self, part: str) -> dict[str, tuple[int, int]]:
        """Bytes and rows of the whole files in a part of the dataset that are in no generation, by name, sorted."""
        known = {name for generation in self.taken for name in generation.files[part]}
        found = {}
        folder = folder_of(self.folder) / part
        if folder.is_dir():
            refuse_tables(folder)
            refuse_partitions(folder)
        for path in parquet_files(folder):
            if path.name in known:
                continue
            try:
                size, rows = path.stat().st_size, rows_if_whole(path)
            except FileNotFoundError:  # renamed since
                continue
            if rows is None:
                self.unreadable.add(f"{part}/{path.name}")
            else:
                found[path.name] = (size, rows)
        return found

    def dataset(self, first: int = 0, last: int | None = None) -> Dataset:
        """The rows of some generations (default: of all), with the items and users that the last of them knows."""
        last = len(self.taken) - 1 if last is None else last
        files = {}
        for part in PARTS:
            wanted = self.taken[first if part == "train" else 0 : last + 1]
            files[part] = {name: size for generation in wanted for name, size in generation.files[part].items()}
        return Dataset(self.folder, files, self.columns if last else None)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The columns of train/ as generation 0 has them."""
        if self._columns is None:
            self._columns = self.dataset(0, 0).train.columns
        return self._columns


def write_counts(path: Path, count_I: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, count_I)
    write_file(path, content.getvalue())


def read_counts(path: Path, mend: str = COUNT_AGAIN) -> np.ndarray:
    """What `write_counts` has written; raises DataError."""
    try:
        return np.array(np.load(path, mmap_mode="r"))  # mapped first: no more memory than the file has bytes
    except Exception as error:  # an altered header can raise anything
        raise DataError(f"{path} cannot be read ({error}): {mend}") from None


def forget_changed(path: Path, data: DataConfig, step: int) -> None:
    """Take the generations out of stream.json from the first on that has changed files and begins not before `step`.

    So a file in which training met a bad row can be mended, as long as no step that is saved has taken rows of it.
    """
    generations = Generations.read(path, data.dataset)
    first_step = 0
    for number, generation in enumerate(generations.taken):
        if first_step >= step and generation.is_changed(folder_of(data.dataset)):
            print(f"The files of generation {number} have changed: they are taken anew", flush=True)
            Generations(data.dataset, generations.taken[:number]).write(path)
            return
        first_step += generation.num_steps(data)


def counts_path(run_dir: Path, generation: int = 0) -> Path:
    """Where a run keeps how often each item was taken, up to and with a generation."""
    return run_dir / (f"item_counts-{generation:08d}.npy" if generation else COUNTS)


class Stream:
    """The batches of a folder that grows; they end when nothing new has come for `data.follow.idle_s`.

    All ranks ask for the same batches at the same time: what has come is seen by the first rank and told to the others.
    """

    def __init__(
        self,
        generations: Generations,
        sources: FeatureDataset,
        data: DataConfig,
        loss: LossConfig,
        run_dir: Path,
        ranks: Ranks,
        *,
        pin_memory: bool = False,
    ) -> None:
        assert data.follow is not None
        self.sources = sources
        self.data = data.model_copy(update={"cache": None})
        self.loss = loss
        self.follow: FollowConfig = data.follow
        self.run_dir = run_dir
        self.ranks = ranks
        self.pin_memory = pin_memory
        self._has_ended = False
        self._current: TrainBatches | None = None
        self._found: tuple[int, FeatureDataset] | None = None  # what the first rank has made of a generation to come
        self._know(generations)

    def _know(self, generations: Generations) -> None:
        self.generations = generations
        self._rows = [
            0,
            *accumulate(used_rows_per_epoch(generation.num_rows, self.data) for generation in generations.taken),
        ]
        self._ends = list(accumulate(generation.num_steps(self.data) for generation in generations.taken))

    @property
    def item_counts(self) -> np.ndarray | None:
        return None if self._current is None else self._current.item_counts

    @property
    def num_steps(self) -> int:
        return self._ends[-1]

    def since(
        self, step: int, lists_at: HardNegativeProvider | None = None, is_stopped: Callable[[], bool] = never
    ) -> Iterator[Batch]:
        number = bisect_right(self._ends, step)
        while number < len(self._ends) or self._grows(is_stopped):
            self._current = self._batches(number)
            yield from self._current.since(step, self._ends[number], lists_at)
            step = self._ends[number]
            number += 1

    def rows_before(self, step: int) -> int:
        number = bisect_right(self._ends, step)
        inside = step - self._first_step(number)
        return self._rows[number] + inside * self.data.batch_size

    def place(self, step: int) -> str:
        return f"generation {bisect_right(self._ends, step - 1)}"

    def rows_of(self, step: int) -> list[StepRows]:
        return self._current.rows_of(step) if self._current is not None else []

    def is_end(self, step: int) -> bool:
        return step > 0 and step == self._first_step(bisect_right(self._ends, step))

    def is_over(self, step: int) -> bool:
        return self._has_ended and step == self.num_steps

    def _first_step(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def _batches(self, number: int) -> TrainBatches:
        """The batches of one generation."""
        self.sources = self.ranks.together(lambda: self._sources_of(self.generations, number))
        self._found = None
        counts_file = counts_path(self.run_dir, number)
        if not self.ranks.once(counts_file.is_file):
            self.ranks.once(lambda: self._count(self.generations, number, self.sources))
        return TrainBatches(
            self.sources,
            self.data,
            self.loss,
            read_counts(counts_file),
            (self.ranks.rank, self.ranks.num_ranks),
            pin_memory=self.pin_memory,
            first_step=self._first_step(number),
            first_epoch=number,
            counted_rows=sum(generation.num_rows for generation in self.generations.taken[: number + 1]),
        )

    def _grows(self, is_stopped: Callable[[], bool]) -> bool:
        """Whether there is a generation more; waits for one as long as the config says, or until told to stop."""
        began = time.monotonic()
        is_waiting = False
        while True:
            found, left_s = self.ranks.once(lambda: (self._look(), self._left_s(began)))
            if found is not None:
                self._know(found)
                return True
            if left_s > 0 and not is_waiting and self.ranks.is_first:
                print(f"waiting for new files in {self.sources.dataset.train.folder}", flush=True)
            is_waiting = True
            self._has_ended = left_s <= 0
            if self._has_ended or _sleep(min(self.follow.poll_s, left_s), is_stopped):
                return False

    def _look(self) -> Generations | None:
        """The generations with one more, written down; None where nothing new has come."""
        said = set(self.generations.unreadable)
        self.generations.unreadable.clear()
        found = self.generations.with_new(self.data)
        for name in sorted(self.generations.unreadable - said):
            print(f"{name} has no readable footer (yet): left out until it has", flush=True)
        if found is None:
            return None
        number = len(found.taken) - 1
        # Counting meets unknown items and files that do not fit while they can still be mended: before they are taken.
        self._found = number, self._sources_of(found, number)
        self._count(found, *self._found)
        found.write(self.run_dir / STREAM)
        return found

    def _left_s(self, began: float) -> float:
        """How long one may wait yet."""
        return math.inf if self.follow.idle_s is None else began + self.follow.idle_s - time.monotonic()

    def _sources_of(self, generations: Generations, number: int) -> FeatureDataset:
        """The rows of a generation, with the items and users it knows."""
        if self._found is not None and self._found[0] == number:
            return self._found[1]
        dataset, last = generations.dataset(number, number), self.sources.dataset
        assert dataset.files is not None and last.files is not None
        if all(list(dataset.files[part].items()) == list(last.files[part].items()) for part in ("items", "users")):
            return self.sources.over(dataset)
        return FeatureDataset(
            dataset, self.sources.schema, self.sources.rows, self.sources.statistics, self.sources.cache
        )

    def _count(self, generations: Generations, number: int, sources: FeatureDataset) -> None:
        """Write how often each item was taken up to a generation, from the counts before it where they are there."""
        before = counts_path(self.run_dir, number - 1)
        if number and before.is_file():
            count_NI = count_items(sources, self.loss)
            if self.data.target_in_history == "drop" and (own := own_items(sources)) is not None:
                print(f"generation {number}: {own.in_words}", flush=True)
            earlier = read_counts(before)
            count_NI[..., : earlier.shape[-1]] += earlier  # rows of later items stand behind
        else:
            count_NI = count_items(sources.over(generations.dataset(0, number)), self.loss)
        write_counts(counts_path(self.run_dir, number), count_NI)
        kept = {counts_path(self.run_dir, each) for each in (number - 1, number, len(generations.taken) - 1)}
        for path in self.run_dir.glob("item_counts-*.npy"):
            if path not in kept:
                path.unlink()
