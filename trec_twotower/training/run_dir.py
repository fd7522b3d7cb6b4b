"""A run folder: the config, what was learned from the data, and the log, all of one training."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trec_twotower.config.base import as_values, validate
from trec_twotower.config.loading import read_yaml, to_yaml
from trec_twotower.config.run_config import TRAINED, RunConfig, check_same_run
from trec_twotower.data.dataset import POSITIVES, Dataset
from trec_twotower.data.feature_dataset import Sources, open_cache
from trec_twotower.data.feature_report import OwnItems, own_items
from trec_twotower.data.features.external_files import external_files
from trec_twotower.data.features.transform import Statistics
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
from trec_twotower.model.step_diagnostics import Histogram
from trec_twotower.storage.atomic import naming, read_json, write_file
from trec_twotower.storage.lock import LOCK_FILES
from trec_twotower.storage.manifest import MANIFEST, digest_of, read_signed, sha256_of, write_signed

CONFIG, STATISTICS, STATUS = "config.yaml", "statistics.json", "status.json"
KNOWN = "known_items.npz"
OWN_ITEMS = "own_items"  # of STATISTICS and STATUS: what data.target_in_history: drop leaves out
LEARN_AGAIN = f"remove {STATISTICS}, and the next command learns from the data again."


class Run:
    """The folder of one training, which `train` fills and every later stage reads."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        """A dataset that is not in the current folder is looked for where the run began."""
        self.folder = folder
        self._as_given = config
        self.config = _with_dataset(config, _begun_in(folder, config))

    @classmethod
    def join(cls, config: RunConfig, ranks: Ranks) -> Run:
        """The run of this config, begun or gone on with.

        Raises ConfigError when its folder is no run's, or holds a checkpoint of another config. Before its first
        checkpoint a run has learned nothing yet: the next config takes its place.
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
        """A run that exists; raises ConfigError when there is none."""
        path = folder / CONFIG
        if not path.is_file():
            raise ConfigError(_no_run(folder))
        return cls(folder, validate(RunConfig, read_yaml(path), str(path)))

    def sources(self, ranks: Ranks, *, trains: bool = False) -> Sources:
        """The run's dataset, seen with the statistics that were learned when it began (and are learned once only).

        Raises DataError where it is not what the run began with; where nobody `trains`, items may have been added.
        """
        ranks.once(self._check_dataset)
        generations = self.generations(ranks)
        dataset = Dataset.of(self.config.data) if generations is None else generations.dataset()
        # What a run that follows has learned, it learned from generation 0; later rows change nothing of it.
        first = dataset if generations is None else generations.dataset(0, 0)
        cache = open_cache(self.config.data)
        path = self.folder / STATISTICS
        begun: list[Sources] = []

        def learn() -> tuple[dict[str, dict[str, Any]], bool]:
            if path.is_file():
                saved = read_signed(path, LEARN_AGAIN)
                _check_same(first, saved)
                return saved["numbers"], False
            cache.check()
            learned = Sources(first, self.config.feature_schema, self.config.data.rows, cache=cache)
            if generations is None or len(generations.taken) == 1:
                begun.append(learned)
            numbers = {name: asdict(statistics) for name, statistics in learned.statistics.items()}
            count_NI = count_items(learned, self.config.loss)
            if not np.atleast_2d(count_NI)[0].any():
                train = learned.dataset.train
                raise DataError(
                    f"{train.folder} has {train.num_rows:,} rows, but all their {POSITIVES!r} are empty or null, so "
                    "there is nothing to learn: write what each user took."
                )
            uncached = self.config.data.model_copy(update={"cache": None})
            TrainBatches(learned, uncached, self.config.loss, count_NI, share=(0, 1))  # raises what it has to
            # The data hold what the config wants of them: only now there is something to write.
            self.folder.mkdir(parents=True, exist_ok=True)
            self.keep_config()
            write_counts(self.folder / COUNTS, count_NI)
            if generations is not None:
                generations.write(self.folder / STREAM)
            own = own_items(learned) if self.config.data.target_in_history == "drop" else None
            facts: dict[str, Any] = {"fingerprint": first.fingerprint, "numbers": numbers, "files": self._digests()}
            facts |= {COUNTS: digest_of(self.folder / COUNTS), OWN_ITEMS: None if own is None else asdict(own)}
            facts |= {"described": first.described_fingerprint, **self._keep_known(learned)}
            facts |= {"begun_in": str(Path.cwd())}
            write_signed(path, facts)
            return numbers, True

        numbers, is_new = ranks.once(learn)
        if begun:
            return begun[0]
        statistics = {name: Statistics(**values) for name, values in numbers.items()}
        sources = Sources(dataset, self.config.feature_schema, self.config.data.rows, statistics, cache)
        if not is_new and (notice := ranks.once(lambda: self._check_known(sources, trains))) and ranks.is_first:
            print(f"trec-twotower: {notice}", file=sys.stderr, flush=True)
        return sources

    def _keep_known(self, sources: Sources) -> dict[str, Any]:
        """Write the items that the run begins with; returns what is for STATISTICS of them and of the users."""
        items = KnownItems.of(sources.catalogue)
        items.write(self.folder / KNOWN)
        users = None if sources.users is None else asdict(KnownUsers.of(sources.users))
        return {KNOWN: digest_of(self.folder / KNOWN), "item_sums": items.sums, "users": users}

    def known_items(self) -> KnownItems:
        """The items that the run began with."""
        saved = read_signed(self.folder / STATISTICS, LEARN_AGAIN)
        path = self.folder / KNOWN
        found = KnownItems.read(path, saved["item_sums"], LEARN_AGAIN)
        if digest_of(path) != saved[KNOWN]:
            raise DataError(f"{path} is damaged (its sha256 differs): {LEARN_AGAIN}")
        return found

    def _check_known(self, sources: Sources, trains: bool) -> str | None:
        """Return a notice of new items, or None; raises DataError where items or users are not what they were."""
        grows = self.config.data.follow is not None
        users = read_signed(self.folder / STATISTICS, LEARN_AGAIN)["users"]
        if trains and not grows and users is not None and sources.users is not None:
            KnownUsers(**users).check(sources.users, self.folder)
        return self.known_items().check(sources.catalogue, self.folder, grows=grows, trains=trains)

    def dataset(self) -> Dataset:
        """The run's dataset, read by one process; raises DataError where it is not the one that the run began with."""
        self._check_dataset()
        generations = self.generations(Ranks(0, 1, torch.device("cpu")))
        dataset = Dataset.of(self.config.data) if generations is None else generations.dataset()
        if (self.folder / STATISTICS).is_file():
            first = dataset if generations is None else generations.dataset(0, 0)
            _check_same(first, read_signed(self.folder / STATISTICS, LEARN_AGAIN))
        return dataset

    def generations(self, ranks: Ranks) -> Generations | None:
        """The files that a run that follows has taken; one that begins takes those that are there."""
        data = self.config.data
        path = self.folder / STREAM
        if data.follow is None:
            return None

        def read() -> Generations:
            has_begun = path.is_file() or (self.folder / STATISTICS).is_file()
            return Generations.read(path, data.dataset) if has_begun else Generations.begin(data)

        return ranks.once(read)

    def keep_config(self) -> None:
        """Write the settings beside what is trained by them."""
        write_file(self.folder / CONFIG, to_yaml(as_values(self._as_given)))

    def _check_dataset(self) -> None:
        """Raise DataError naming the places where a run's dataset was looked for and is not."""
        place = self.config.data.dataset
        if not (self.folder / STATISTICS).is_file() or folder_of(place).is_dir():
            return  # of a run that has not begun, Dataset says what is missing
        begun_in = read_signed(self.folder / STATISTICS, LEARN_AGAIN).get("begun_in")
        places = f"neither in the current folder, {Path.cwd()}, nor in {begun_in or 'the folder'}, where the run began"
        is_relative = "://" not in str(place) and not Path(place).is_absolute()
        raise DataError(
            f"There is no dataset folder {place}{f', {places}' if is_relative else ''}: bring it back, or set "
            f"data.dataset in {self.folder / CONFIG} to its new place."
        )

    @property
    def has_learned(self) -> bool:
        """Whether its training has begun, so that `learned` has something to say."""
        return (self.folder / STATISTICS).is_file()

    def learned(self) -> dict[str, Any]:
        """What the features learned when the run began, and the digests of the files that the config names."""
        return read_signed(self.folder / STATISTICS, LEARN_AGAIN)

    def check_files(self) -> None:
        """Raises DataError where a file of items that the config names is not what it was when the run began."""
        saved = self.learned()["files"]
        for name, digest in self._digests().items():
            if saved.get(name) != digest:
                raise DataError(
                    f"{name} is not the file that this run began with (sha256 {digest[:12]}, then "
                    f"{str(saved.get(name))[:12]}): bring that one back, or train into another run_dir."
                )

    def _digests(self) -> dict[str, str]:
        """SHA-256 of the files that training reads beside the dataset."""
        mined = self.config.loss.negatives.mined
        paths = [self.config.loss.known, None if mined is None else mined.file]
        for feature in (*self.config.user, *self.config.item):
            paths += external_files(feature)
        return {str(path): sha256_of(path) for path in paths if path is not None and path.is_file()}

    def own_items(self) -> OwnItems | None:
        """What `data.target_in_history: drop` leaves out of the rows that the run began with; None without it."""
        found = read_signed(self.folder / STATISTICS, LEARN_AGAIN).get(OWN_ITEMS)
        return None if found is None else OwnItems(**found)

    def item_counts(self, keys: np.ndarray | None = None) -> np.ndarray:
        """How often each of these items, given by their ids' 64-bit keys (I,), was interacted with in train: (I,).

        By default of the items that the run began with, in their order.
        """
        count_I = np.atleast_2d(self.counts())[0]
        if keys is None:
            return count_I
        if self.config.data.follow is not None:  # rows of later items come after those of earlier ones
            return np.pad(count_I, (0, max(len(keys) - len(count_I), 0)))[: len(keys)]
        return self.known_items().counts_of(keys, count_I)

    def counts(self) -> np.ndarray:
        """What negatives.count_items has counted."""
        data = self.config.data
        if data.follow is not None:
            newest = len(Generations.read(self.folder / STREAM, data.dataset).taken) - 1
            if newest:
                return read_counts(counts_path(self.folder, newest), COUNT_AGAIN)
        path, digest = self.folder / COUNTS, read_signed(self.folder / STATISTICS, LEARN_AGAIN)[COUNTS]
        count_NI = read_counts(path, LEARN_AGAIN)
        if digest_of(path) != digest:
            raise DataError(f"{path} is damaged (its sha256 differs): {LEARN_AGAIN}")
        return count_NI


class RunLog:
    """metrics.jsonl and TensorBoard of a run, written by the first rank; a resumed run goes on behind its step."""

    def __init__(self, run: Run, ranks: Ranks, step: int) -> None:
        self.path = run.folder / "metrics.jsonl"
        self.is_written = ranks.is_first
        if not self.is_written:
            return
        from torch.utils.tensorboard import SummaryWriter

        if self.path.is_file():
            whole = self.path.read_text().split("\n")[:-1]  # a line that was cut short has no end
            lines = [line for line in whole if json.loads(line)["step"] <= step]
            write_file(self.path, "".join(line + "\n" for line in lines))
        # Stays this run's where the folder is moved and another takes its place.
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, self._file)
        self.board_folder = run.folder / "tensorboard"
        with naming(self.board_folder):
            self.board = SummaryWriter(str(self.board_folder), purge_step=step + 1)

    def write(self, step: int, kind: str, values: Mapping[str, float | Histogram]) -> None:
        """One line, such as {"step": 20, "kind": "train", "loss": 6.1}; of a histogram its edges and counts."""
        if not self.is_written:
            return
        plain = {
            name: {"edges": value.edges.round(6).tolist(), "counts": value.counts.astype(int).tolist()}
            if isinstance(value, Histogram)
            else value
            for name, value in values.items()
        }
        self._append({"step": step, "kind": kind, **plain})
        if not self.board_folder.is_dir():  # moved: TensorBoard's thread opens its file by name, and would raise
            return
        with naming(self.board_folder):
            for name, value in values.items():
                if isinstance(value, Histogram):
                    self._draw(f"{kind}/{name}", value, step)
                else:
                    self.board.add_scalar(f"{kind}/{name}", value, step)
            self.board.flush()

    def note(self, step: int, kind: str, facts: Mapping[str, Any]) -> None:
        """One line of values that are no figures, such as what the first weights were taken from."""
        if self.is_written:
            self._append({"step": step, "kind": kind, **facts})

    def _append(self, line: Mapping[str, Any]) -> None:
        with naming(self.path):
            os.write(self._file, (json.dumps(line) + "\n").encode())

    def warn(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line with kind "warning"."""
        if self.is_written:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps({"step": step, "kind": "warning", **values}) + "\n")

    def warnings_and_last_validation(self) -> list[dict[str, Any]]:
        """Return those lines; only the first rank has them."""
        if not self.path.is_file():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "valid"][-1:]
        return [line for line in lines if line["kind"] == "warning"] + last

    def _draw(self, name: str, histogram: Histogram, step: int) -> None:
        edges, counts = histogram.edges, histogram.counts
        middle = (edges[1:] + edges[:-1]) / 2
        self.board.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * middle).sum(),
            sum_squares=(counts * middle**2).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        if self.is_written:
            self._close()
            with naming(self.board_folder):
                self.board.close()


def _begun_in(run_dir: Path, config: RunConfig) -> Path | None:
    """The folder in which a run's command began it, where the dataset is not in the current one."""
    place = str(config.data.dataset)
    if "://" in place or Path(place).is_absolute() or Path(place).is_dir() or not (run_dir / STATISTICS).is_file():
        return None
    begun_in = read_json(run_dir / STATISTICS, LEARN_AGAIN).get("begun_in")
    return None if begun_in is None else Path(begun_in)


def _with_dataset(config: RunConfig, begun_in: Path | None) -> RunConfig:
    """The config with its dataset in `begun_in`, where it is there."""
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
    """Raises DataError where the dataset is not that of which a run has `saved` what it learned."""
    if KNOWN not in saved:
        raise DataError(f"{STATISTICS} was written by an earlier version, which kept no items: {LEARN_AGAIN}")
    pairs = [(saved["fingerprint"], dataset.fingerprint), (saved["described"], dataset.described_fingerprint)]
    for then, now in pairs:
        if then != now and None not in (then, now):  # dataset.yaml may be removed
            raise DataError(
                f"{dataset.folder} is not the dataset this run began with (fingerprint {now}, then {then}, of the "
                "files with rows): bring that one back, or train into another run_dir."
            )
