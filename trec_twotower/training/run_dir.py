"""A run directory: the config, what was learned from the data, and the checkpoints of one training."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trec_twotower.config.base import as_values, validate
from trec_twotower.config.loading import read_yaml, to_yaml
from trec_twotower.config.run_config import TRAINED, RunConfig, check_same_run
from trec_twotower.data.dataset import POSITIVES, Dataset
from trec_twotower.data.feature_dataset import FeatureDataset, open_cache
from trec_twotower.data.feature_report import OwnItems, own_items
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.known_items import KnownItems, KnownUsers
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.loading.streaming import (
    COUNT_AGAIN,
    COUNTS,
    STREAM,
    Generations,
    counts_path,
    forget_changed,
    read_counts,
    write_counts,
)
from trec_twotower.data.negatives.samplers import count_items
from trec_twotower.data.parquet_files import folder_of
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.storage.atomic import read_json, write_file
from trec_twotower.storage.lock import LOCK_FILES
from trec_twotower.storage.manifest import MANIFEST, digest_of, read_signed, sha256_of, write_signed

CONFIG, STATISTICS, STATUS = "config.yaml", "statistics.json", "status.json"
KNOWN = "known_items.npz"
OWN_ITEMS = "own_items"  # of STATISTICS and STATUS: what data.target_in_history: drop leaves out
LEARN_AGAIN = f"remove {STATISTICS}, and the next command learns from the data again."


class Run:
    """The directory of one training, which `train` writes and every later stage reads."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        """Open a run. A dataset that is not in the current folder is looked up in the folder where the run began."""
        self.folder = folder
        self._original_config = config
        self.config = _with_dataset(config, _begun_in(folder, config))

    @classmethod
    def create_or_open(cls, config: RunConfig, ranks: Ranks) -> Run:
        """Return the run of this config, new or to be resumed.

        Raises ConfigError where the folder is not a run directory, or holds a checkpoint of another config. A run
        without a checkpoint starts over, with this config.
        """
        assert config.run_dir is not None
        folder = config.run_dir

        def begin() -> None:
            for leftover in folder.glob(".*.tmp-*"):  # of a write_file that was killed
                if leftover.is_file():
                    leftover.unlink()
            if not (folder / CONFIG).is_file():
                if folder.is_dir() and any(path.name not in (*LOCK_FILES, TRAINED) for path in folder.iterdir()):
                    raise ConfigError(f"{folder} is not empty and no run folder: name another with run_dir=...")
            elif any((folder / "checkpoints").glob(f"step-*/{MANIFEST}")):
                check_same_run(cls.open(folder).config, config, folder)
                data = cls(folder, config).config.data
                if data.follow is not None and folder_of(data.dataset).is_dir():
                    trained = max(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*"))
                    forget_changed(folder / STREAM, data, trained)
            else:
                (folder / STATISTICS).unlink(missing_ok=True)
                (folder / STREAM).unlink(missing_ok=True)

        ranks.once(begin)
        return cls(folder, config)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Return an existing run; raises ConfigError where there is none."""
        path = folder / CONFIG
        if not path.is_file():
            raise ConfigError(_no_run(folder))
        return cls(folder, validate(RunConfig, read_yaml(path), str(path)))

    def initialize(self, ranks: Ranks) -> FeatureDataset | None:
        """Learn from the dataset what its features need, write it to the run directory, and return the dataset.

        Return None where the run has been initialized before. Nothing is written unless the dataset can be trained on:
        raises DataError or ConfigError where it cannot.
        """
        if ranks.once(lambda: self.has_learned):
            return None
        ranks.once(self._check_dataset)
        generations = self.generations(ranks)
        learned: list[FeatureDataset] = []  # on the first rank

        def learn() -> dict[str, dict[str, Any]]:
            cache = open_cache(self.config.data)
            cache.check()
            first = self._first_dataset(generations)
            sources = FeatureDataset(first, self.config.feature_schema, self.config.data.rows, cache=cache)
            count_NI = count_items(sources, self.config.loss)
            self._check_trainable(sources, count_NI)
            self._write_learned(sources, count_NI, generations)
            if generations is None or len(generations.entries) == 1:
                learned.append(sources)
            return {name: asdict(statistics) for name, statistics in sources.statistics.items()}

        numbers = ranks.once(learn)
        return learned[0] if learned else self._sources(numbers, generations)

    def open_dataset(self, ranks: Ranks, *, for_training: bool = False) -> FeatureDataset:
        """Return the dataset of a run that has been initialized, with the statistics learned then.

        Raises DataError where it is not the dataset that the run began with; unless `for_training`, items may have
        been added.
        """
        ranks.once(self._check_dataset)
        generations = self.generations(ranks)

        def read() -> dict[str, dict[str, Any]]:
            saved = self.learned()
            _check_same(self._first_dataset(generations), saved)
            return saved["numbers"]

        sources = self._sources(ranks.once(read), generations)
        if (notice := ranks.once(lambda: self._check_known(sources, for_training))) and ranks.is_first:
            print(f"trec-twotower: {notice}", file=sys.stderr, flush=True)
        return sources

    def _first_dataset(self, generations: Generations | None) -> Dataset:
        """Return the rows that the run learned from: of a growing folder, those of generation 0."""
        return Dataset.of(self.config.data) if generations is None else generations.dataset(0, 0)

    def _sources(self, numbers: dict[str, dict[str, Any]], generations: Generations | None) -> FeatureDataset:
        dataset = Dataset.of(self.config.data) if generations is None else generations.dataset()
        statistics = {name: Statistics(**values) for name, values in numbers.items()}
        cache = open_cache(self.config.data)
        return FeatureDataset(dataset, self.config.feature_schema, self.config.data.rows, statistics, cache)

    def _check_trainable(self, sources: FeatureDataset, count_NI: np.ndarray) -> None:
        """Raise what reading batches of this dataset would raise, before anything is written."""
        if not np.atleast_2d(count_NI)[0].any():
            train = sources.dataset.train
            raise DataError(
                f"{train.folder} has {train.num_rows:,} rows, but all their {POSITIVES!r} are empty or null, so "
                "there is nothing to learn: write the items of each user."
            )
        uncached = self.config.data.model_copy(update={"cache": None})
        TrainBatches(sources, uncached, self.config.loss, count_NI, share=(0, 1))

    def _write_learned(self, sources: FeatureDataset, count_NI: np.ndarray, generations: Generations | None) -> None:
        """Write the config, the counts and STATISTICS, which comes last: with it the run is initialized."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_config()
        write_counts(self.folder / COUNTS, count_NI)
        if generations is not None:
            generations.write(self.folder / STREAM)
        items = KnownItems.of(sources.catalogue)
        items.write(self.folder / KNOWN)
        own = own_items(sources) if self.config.data.target_in_history == "drop" else None
        facts = {
            "fingerprint": sources.dataset.fingerprint,
            "numbers": {name: asdict(statistics) for name, statistics in sources.statistics.items()},
            "files": self._digests(),
            COUNTS: digest_of(self.folder / COUNTS),
            OWN_ITEMS: None if own is None else asdict(own),
            "described": sources.dataset.described_fingerprint,
            KNOWN: digest_of(self.folder / KNOWN),
            "item_sums": items.sums,
            "users": None if sources.users is None else asdict(KnownUsers.of(sources.users)),
            "begun_in": str(Path.cwd()),
        }
        write_signed(self.folder / STATISTICS, facts)

    def known_items(self) -> KnownItems:
        """Return the items that the run began with."""
        saved = self.learned()
        path = self.folder / KNOWN
        found = KnownItems.read(path, saved["item_sums"], LEARN_AGAIN)
        if digest_of(path) != saved[KNOWN]:
            raise DataError(f"{path} is damaged (its sha256 differs): {LEARN_AGAIN}")
        return found

    def _check_known(self, sources: FeatureDataset, trains: bool) -> str | None:
        """Return a notice of new items, or None; raises DataError where items or users are not what they were."""
        grows = self.config.data.follow is not None
        users = self.learned()["users"]
        if trains and not grows and users is not None and sources.users is not None:
            KnownUsers(**users).check(sources.users, self.folder)
        return self.known_items().check(sources.catalogue, self.folder, grows=grows, trains=trains)

    def dataset(self) -> Dataset:
        """Return the run's dataset, for one process; raises DataError where the run began with another."""
        self._check_dataset()
        generations = self.generations(Ranks(0, 1, torch.device("cpu")))
        dataset = Dataset.of(self.config.data) if generations is None else generations.dataset()
        if self.has_learned:
            first = dataset if generations is None else generations.dataset(0, 0)
            _check_same(first, self.learned())
        return dataset

    def generations(self, ranks: Ranks) -> Generations | None:
        """Return the files that a run on a growing folder reads, those there now where it is new; None for others."""
        data = self.config.data
        path = self.folder / STREAM
        if data.follow is None:
            return None

        def read() -> Generations:
            has_begun = path.is_file() or self.has_learned
            return Generations.read(path, data.dataset) if has_begun else Generations.begin(data)

        return ranks.once(read)

    def write_config(self) -> None:
        """Write the config to the run directory."""
        write_file(self.folder / CONFIG, to_yaml(as_values(self._original_config)))

    def _check_dataset(self) -> None:
        """Raise DataError naming the places where a run's dataset was looked for and is not."""
        place = self.config.data.dataset
        if not self.has_learned or folder_of(place).is_dir():
            return  # for a new run, Dataset reports what is missing
        begun_in = self.learned().get("begun_in")
        places = f"neither in the current folder, {Path.cwd()}, nor in {begun_in or 'the folder'}, where the run began"
        is_relative = "://" not in str(place) and not Path(place).is_absolute()
        raise DataError(
            f"There is no dataset folder {place}{f', {places}' if is_relative else ''}: bring it back, or set "
            f"data.dataset in {self.folder / CONFIG} to its new place."
        )

    @property
    def has_learned(self) -> bool:
        """Return whether the run has been initialized."""
        return (self.folder / STATISTICS).is_file()

    def learned(self) -> dict[str, Any]:
        """Return what `initialize` wrote: what the features learned, and the digests of files that the config names."""
        return read_signed(self.folder / STATISTICS, LEARN_AGAIN)

    def check_files(self) -> None:
        """Raise DataError where a file that the config names is not what it was when the run began."""
        saved = self.learned()["files"]
        for name, digest in self._digests().items():
            if saved.get(name) != digest:
                raise DataError(
                    f"{name} is not the file that this run began with (sha256 {digest[:12]}, then "
                    f"{str(saved.get(name))[:12]}): bring that one back, or train into another run_dir."
                )

    def _digests(self) -> dict[str, str]:
        """Return the SHA-256 of the files that training reads in addition to the dataset, by path."""
        mined = self.config.loss.negatives.mined
        paths = [self.config.loss.known, None if mined is None else mined.file]
        for feature in (*self.config.user, *self.config.item):
            paths += feature.external_files
        return {str(path): sha256_of(path) for path in paths if path is not None and path.is_file()}

    def own_items(self) -> OwnItems | None:
        """Return what `data.target_in_history: drop` leaves out of the rows of a new run, or None."""
        found = self.learned().get(OWN_ITEMS)
        return None if found is None else OwnItems(**found)

    def item_counts(self, keys: np.ndarray | None = None) -> np.ndarray:
        """Return the interactions in train of each item, (I,).

        `keys` are the 64-bit keys of the items' ids, (I,); by default the items that the run began with, in order.
        """
        count_I = np.atleast_2d(self.counts())[0]
        if keys is None:
            return count_I
        if self.config.data.follow is not None:  # rows of later items come after those of earlier ones
            return np.pad(count_I, (0, max(len(keys) - len(count_I), 0)))[: len(keys)]
        return self.known_items().counts_of(keys, count_I)

    def counts(self) -> np.ndarray:
        """Return the counts of negatives.count_items."""
        data = self.config.data
        if data.follow is not None:
            newest = len(Generations.read(self.folder / STREAM, data.dataset).entries) - 1
            if newest:
                return read_counts(counts_path(self.folder, newest), COUNT_AGAIN)
        path, digest = self.folder / COUNTS, self.learned()[COUNTS]
        count_NI = read_counts(path, LEARN_AGAIN)
        if digest_of(path) != digest:
            raise DataError(f"{path} is damaged (its sha256 differs): {LEARN_AGAIN}")
        return count_NI


def _begun_in(run_dir: Path, config: RunConfig) -> Path | None:
    """Return the folder that the run was started in, where the dataset is not in the current one."""
    place = str(config.data.dataset)
    if "://" in place or Path(place).is_absolute() or Path(place).is_dir() or not (run_dir / STATISTICS).is_file():
        return None
    begun_in = read_json(run_dir / STATISTICS, LEARN_AGAIN).get("begun_in")
    return None if begun_in is None else Path(begun_in)


def _with_dataset(config: RunConfig, begun_in: Path | None) -> RunConfig:
    """Return the config with its dataset in `begun_in`, where there is one."""
    if begun_in is None or not (begun_in / config.data.dataset).is_dir():
        return config
    data = config.data.model_copy(update={"dataset": str(begun_in / config.data.dataset)})
    return config.model_copy(update={"data": data})


def _no_run(folder: Path) -> str:
    """Return why there is no run at `folder`, with the run most like it among its neighbours."""
    if folder.is_file():
        inside = f"name the run folder {folder.parent}" if (folder.parent / CONFIG).is_file() else "name a run folder"
        return f"{folder} is a file: {inside}."
    if (folder / "train").is_dir() and (folder / "items").is_dir():
        return f"{folder} is a dataset, and no run folder (it has no {CONFIG}): name the run that was trained on it."
    runs = [path.parent.name for path in folder.parent.glob(f"*/{CONFIG}")] if folder.parent.is_dir() else []
    return f"{folder} is no run folder (it has no {CONFIG}){nearest(folder.name, runs)}: train one."


def _check_same(dataset: Dataset, saved: dict[str, Any]) -> None:
    """Raise DataError where the dataset is not the one that a run learned from; `saved` is of `Run.learned`."""
    if KNOWN not in saved:
        raise DataError(f"{STATISTICS} was written by an earlier version, which kept no items: {LEARN_AGAIN}")
    pairs = [(saved["fingerprint"], dataset.fingerprint), (saved["described"], dataset.described_fingerprint)]
    for then, now in pairs:
        if then != now and None not in (then, now):  # dataset.yaml may be removed
            raise DataError(
                f"{dataset.folder} is not the dataset this run began with (fingerprint {now}, then {then}, of the "
                "files with rows): bring that one back, or train into another run_dir."
            )
