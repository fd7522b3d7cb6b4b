"""Training batches in passes: the epochs of a fixed dataset, or the generations of a growing folder.

The files in train/ when a run begins are generation 0. The files that arrive while it is read are generation 1, and so
on. Each generation is read once, in the order of the epoch with its number, and its last step may be smaller. The run's
stream.json lists a generation before its first row is used, so a resumed run repeats the same rows in the same steps
even if more files have arrived. The step number is the whole cursor. New items and users are known from the next
generation on.
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

PARTS = ("train", "items", "users")  # read in this order, because writers add new items before rows of them
STREAM, COUNTS = "stream.json", "item_counts.npy"
COUNT_AGAIN = "remove it, and train counts again."
STOP_S = 1.0  # interval at which a waiting rank checks for a stop


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
    """The training batches from any step on, and the pass and rows of each step."""

    @property
    def sources(self) -> FeatureDataset:
        """Return the dataset of the latest batch."""

    @property
    def item_counts(self) -> np.ndarray | None:
        """Return the interactions of each item in `sources.catalogue`, (I,); None before a stream's first batch."""

    @property
    def num_steps(self) -> int:
        """Return the number of steps known so far."""

    def iter_from(
        self, step: int, hard_negatives_at: HardNegativeProvider | None = None, is_stopped: Callable[[], bool] = never
    ) -> Iterator[Batch]:
        """Yield the batches of this step and all later ones.

        See TrainBatches for `hard_negatives_at`. All ranks call `is_stopped` together while they wait for files.
        """

    def rows_before(self, step: int) -> int:
        """Return the number of rows in the steps before this one, over all ranks."""

    def place(self, step: int) -> str:
        """Return the pass of the step before this one, such as epoch 1/3."""

    def rows_of(self, step: int) -> list[StepRows]:
        """Return the files and row numbers of a step's rows; empty if they are not known yet."""

    def is_end(self, step: int) -> bool:
        """Return whether a pass ends before this step."""

    def is_over(self, step: int) -> bool:
        """Return whether training ends before this step."""


class Epochs:
    """The batches of several epochs over a fixed dataset."""

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

    def iter_from(
        self, step: int, hard_negatives_at: HardNegativeProvider | None = None, is_stopped: Callable[[], bool] = never
    ) -> Iterator[Batch]:
        return self.batches.iter_from(step, self.num_steps, hard_negatives_at)

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
    """The files of one pass over a growing folder."""

    files: dict[str, dict[str, int]]  # part of the dataset -> file name -> bytes
    num_rows: int  # rows in the files of train/

    def num_steps(self, data: DataConfig) -> int:
        return -(-used_rows_per_epoch(self.num_rows, data) // data.batch_size)

    def is_changed(self, folder: Path) -> bool:
        """Return whether a file is missing or has another size."""
        for part, files in self.files.items():
            for name, size in files.items():
                path = folder / part / name
                if not path.is_file() or path.stat().st_size != size:
                    return True
        return False


class Generations:
    """The files of a growing folder, in the order in which a run reads them."""

    def __init__(
        self, folder: Path | str, entries: tuple[Generation, ...], columns: dict[str, pa.DataType] | None = None
    ) -> None:
        self.folder = folder
        self.entries = entries
        self._columns = columns
        self.unreadable: set[str] = set()  # files without a readable footer at the last check

    @classmethod
    def begin(cls, data: DataConfig) -> Generations:
        """Return a generation 0 of all complete files; raises DataError if their rows are too few for a step."""
        Dataset.of(data)  # raises if a part of the folder is missing
        first = cls(data.dataset, ()).with_new(data)
        if first is None:
            needed = f"{data.batch_size:,} rows (data.drop_last)" if data.drop_last else "a row"
            raise DataError(
                f"{data.dataset}/train has no whole Parquet files with {needed} yet: start when there are some."
            )
        return first

    @classmethod
    def read(cls, path: Path, folder: Path | str) -> Generations:
        """Read the file that `write` wrote; raises DataError."""
        fix = "bring it back, or train into another run_dir."
        values = read_json(path, fix)
        try:
            return cls(folder, tuple(Generation(**value) for value in values["generations"]))
        except (TypeError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}): {fix}") from None

    def write(self, path: Path) -> None:
        """Write the generations as JSON."""
        write_json(path, {"generations": [asdict(generation) for generation in self.entries]})

    def with_new(self, data: DataConfig) -> Generations | None:
        """Return these generations and one of the new complete files; None if those have no rows for a step."""
        new_files = {part: self._new_files(part) for part in PARTS}
        num_rows = sum(rows for _, rows in new_files["train"].values())
        if used_rows_per_epoch(num_rows, data) == 0:
            return None
        files = {part: {name: size for name, (size, _) in of_part.items()} for part, of_part in new_files.items()}
        return Generations(self.folder, (*self.entries, Generation(files, num_rows)), self._columns)

    def _new_files(self, part: str) -> dict[str, tuple[int, int]]:
        """Return the bytes and rows of the complete files of a part that are in no generation, by sorted name."""
        known = {name for generation in self.entries for name in generation.files[part]}
        new_files = {}
        folder = folder_of(self.folder) / part
        if folder.is_dir():
            refuse_tables(folder)
            refuse_partitions(folder)
        for path in parquet_files(folder):
            if path.name in known:
                continue
            try:
                size, rows = path.stat().st_size, rows_if_whole(path)
            except FileNotFoundError:  # renamed in the meantime
                continue
            if rows is None:
                self.unreadable.add(f"{part}/{path.name}")
            else:
                new_files[path.name] = (size, rows)
        return new_files

    def dataset(self, first: int = 0, last: int | None = None) -> Dataset:
        """Return the rows of some generations (default: all), with the items and users up to the last of them."""
        last = len(self.entries) - 1 if last is None else last
        files = {}
        for part in PARTS:
            generations = self.entries[first if part == "train" else 0 : last + 1]
            files[part] = {name: size for generation in generations for name, size in generation.files[part].items()}
        return Dataset(self.folder, files, self.columns if last else None)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Return the columns of train/ in generation 0."""
        if self._columns is None:
            self._columns = self.dataset(0, 0).train.columns
        return self._columns


def write_counts(path: Path, count_I: np.ndarray) -> None:
    """Write the item counts as .npy."""
    content = io.BytesIO()
    np.save(content, count_I)
    write_file(path, content.getvalue())


def read_counts(path: Path, fix: str = COUNT_AGAIN) -> np.ndarray:
    """Return the counts that `write_counts` wrote; raises DataError."""
    try:
        return np.array(np.load(path, mmap_mode="r"))  # mapped first, so that it allocates at most the file's size
    except Exception as error:  # a damaged header can raise any exception
        raise DataError(f"{path} cannot be read ({error}): {fix}") from None


def forget_changed(path: Path, data: DataConfig, step: int) -> None:
    """Remove the generations with changed files that begin at `step` or later, and all after them, from stream.json.

    A file with a bad row can therefore be fixed, as long as no saved step has used rows of it.
    """
    generations = Generations.read(path, data.dataset)
    first_step = 0
    for number, generation in enumerate(generations.entries):
        if first_step >= step and generation.is_changed(folder_of(data.dataset)):
            print(f"The files of generation {number} have changed: they are read again", flush=True)
            Generations(data.dataset, generations.entries[:number]).write(path)
            return
        first_step += generation.num_steps(data)


def counts_path(run_dir: Path, generation: int = 0) -> Path:
    """Return the path of a run's item counts up to and including a generation."""
    return run_dir / (f"item_counts-{generation:08d}.npy" if generation else COUNTS)


class Stream:
    """The batches of a growing folder; they end when no new file has arrived for `data.follow.idle_s` seconds.

    All ranks request the same batches at the same time. The first rank looks for new files and broadcasts them.
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
        self._next: tuple[int, FeatureDataset] | None = None  # the dataset of the next generation, on the first rank
        self._set_generations(generations)

    def _set_generations(self, generations: Generations) -> None:
        self.generations = generations
        self._rows = [
            0,
            *accumulate(used_rows_per_epoch(generation.num_rows, self.data) for generation in generations.entries),
        ]
        self._ends = list(accumulate(generation.num_steps(self.data) for generation in generations.entries))

    @property
    def item_counts(self) -> np.ndarray | None:
        return None if self._current is None else self._current.item_counts

    @property
    def num_steps(self) -> int:
        return self._ends[-1]

    def iter_from(
        self, step: int, hard_negatives_at: HardNegativeProvider | None = None, is_stopped: Callable[[], bool] = never
    ) -> Iterator[Batch]:
        number = bisect_right(self._ends, step)
        while number < len(self._ends) or self._grows(is_stopped):
            self._current = self._batches(number)
            yield from self._current.iter_from(step, self._ends[number], hard_negatives_at)
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
        """Return the batches of one generation."""
        self.sources = self.ranks.together(lambda: self._generation_sources(self.generations, number))
        self._next = None
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
            counted_rows=sum(generation.num_rows for generation in self.generations.entries[: number + 1]),
        )

    def _grows(self, is_stopped: Callable[[], bool]) -> bool:
        """Wait for the next generation, at most as long as configured or until stopped; return whether it exists."""
        start_s = time.monotonic()
        is_waiting = False
        while True:
            generations, remaining_s = self.ranks.once(lambda: (self._find_next(), self._remaining_s(start_s)))
            if generations is not None:
                self._set_generations(generations)
                return True
            if remaining_s > 0 and not is_waiting and self.ranks.is_first:
                print(f"waiting for new files in {self.sources.dataset.train.folder}", flush=True)
            is_waiting = True
            self._has_ended = remaining_s <= 0
            if self._has_ended or _sleep(min(self.follow.poll_s, remaining_s), is_stopped):
                return False

    def _find_next(self) -> Generations | None:
        """Return the generations with a new one, after writing them to stream.json; None without new files."""
        reported = set(self.generations.unreadable)
        self.generations.unreadable.clear()
        generations = self.generations.with_new(self.data)
        for name in sorted(self.generations.unreadable - reported):
            print(f"{name} has no readable footer (yet): left out until it has one", flush=True)
        if generations is None:
            return None
        number = len(generations.entries) - 1
        # Count first: unknown items and mismatched files must raise before the files are part of a generation.
        self._next = number, self._generation_sources(generations, number)
        self._count(generations, *self._next)
        generations.write(self.run_dir / STREAM)
        return generations

    def _remaining_s(self, start_s: float) -> float:
        """Return the remaining waiting time in seconds."""
        return math.inf if self.follow.idle_s is None else start_s + self.follow.idle_s - time.monotonic()

    def _generation_sources(self, generations: Generations, number: int) -> FeatureDataset:
        """Return the rows of a generation, with the items and users up to it."""
        if self._next is not None and self._next[0] == number:
            return self._next[1]
        dataset, last = generations.dataset(number, number), self.sources.dataset
        assert dataset.files is not None and last.files is not None
        if all(list(dataset.files[part].items()) == list(last.files[part].items()) for part in ("items", "users")):
            return self.sources.over(dataset)
        return FeatureDataset(
            dataset, self.sources.schema, self.sources.rows, self.sources.statistics, self.sources.cache
        )

    def _count(self, generations: Generations, number: int, sources: FeatureDataset) -> None:
        """Write the item counts up to a generation; add to the counts of the generation before if they exist."""
        before = counts_path(self.run_dir, number - 1)
        if number and before.is_file():
            count_NI = count_items(sources, self.loss)
            if self.data.target_in_history == "drop" and (own := own_items(sources)) is not None:
                print(f"generation {number}: {own.describe}", flush=True)
            earlier = read_counts(before)
            count_NI[..., : earlier.shape[-1]] += earlier  # later items have higher row numbers
        else:
            count_NI = count_items(sources.over(generations.dataset(0, number)), self.loss)
        write_counts(counts_path(self.run_dir, number), count_NI)
        needed = {counts_path(self.run_dir, each) for each in (number - 1, number, len(generations.entries) - 1)}
        for path in self.run_dir.glob("item_counts-*.npy"):
            if path not in needed:
                path.unlink()
