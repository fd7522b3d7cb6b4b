"""A run folder: the config, what was learned from the data, and the log, all of one training."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trec_twotower.config import (
    RunConfig,
    as_values,
    check_same_run,
    read_yaml,
    to_yaml,
    validate,
)
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.features import Sources
from trec_twotower.data.transforms import Statistics
from trec_twotower.distributed import Ranks
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.files import MANIFEST, read_json, write_file, write_json

CONFIG, STATISTICS, COUNTS = "config.yaml", "statistics.json", "item_counts.npy"
LEARN_AGAIN = f"remove {STATISTICS}, and the next command learns from the data again."


class Run:
    """The folder of one training, which `train` fills and every later stage reads."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def join(cls, config: RunConfig, ranks: Ranks) -> Run:
        """The run of this config, begun or gone on with.

        Raises ConfigError when its folder is no run's, or holds a checkpoint of another config. Before its first
        checkpoint a run has learned nothing yet: the next config takes its place.
        """
        assert config.run_dir is not None
        folder = config.run_dir

        def begin() -> None:
            if not (folder / CONFIG).is_file():
                if folder.is_dir() and any(folder.iterdir()):
                    raise ConfigError(f"{folder} is not empty and no run folder: name another with run_dir=...")
            elif any((folder / "checkpoints").glob(f"step-*/{MANIFEST}")):
                check_same_run(cls.open(folder).config, config, folder)
                write_file(folder / CONFIG, to_yaml(as_values(config)))
            else:
                (folder / STATISTICS).unlink(missing_ok=True)

        ranks.once(begin)
        return cls(folder, config)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """A run that exists; raises ConfigError when there is none."""
        path = folder / CONFIG
        if not path.is_file():
            near = [other.name for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise ConfigError(f"{folder} is no run folder (it has no {CONFIG}){nearest(folder.name, near)}: train one.")
        return cls(folder, validate(RunConfig, read_yaml(path), str(path)))

    def sources(self, ranks: Ranks) -> Sources:
        """The run's dataset, seen with the statistics that were learned when it began (and are learned once only)."""
        dataset = Dataset(self.config.data.dataset)
        path = self.folder / STATISTICS

        def learn() -> dict[str, dict[str, Any]]:
            if path.is_file():
                saved = read_json(path, LEARN_AGAIN)
                if saved["fingerprint"] != dataset.fingerprint:
                    raise DataError(
                        f"{dataset.folder} is not the dataset this run began with (fingerprint {dataset.fingerprint}, "
                        f"then {saved['fingerprint']}): bring that one back, or train into another run_dir."
                    )
                return saved["numbers"]
            learned = Sources(dataset, self.config.feature_schema, self.config.data.rows)
            numbers = {name: asdict(statistics) for name, statistics in learned.statistics.items()}
            counts = io.BytesIO()
            np.save(counts, learned.item_counts())
            # The data hold what the config wants of them: only now there is something to write.
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / CONFIG, to_yaml(as_values(self.config)))
            write_file(self.folder / COUNTS, counts.getvalue())
            write_json(path, {"fingerprint": dataset.fingerprint, "numbers": numbers})
            return numbers

        numbers = ranks.once(learn)
        statistics = {name: Statistics(**values) for name, values in numbers.items()}
        return Sources(dataset, self.config.feature_schema, self.config.data.rows, statistics)

    def item_counts(self) -> np.ndarray:
        """How often each item of the catalogue was taken in train."""
        path = self.folder / COUNTS
        try:
            return np.load(path)
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read ({error}): {LEARN_AGAIN}") from None


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
        self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line, such as {"step": 20, "kind": "train", "loss": 6.1}."""
        if not self.is_written:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self.is_written:
            self.board.close()
