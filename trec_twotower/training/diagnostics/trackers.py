"""Experiment trackers to which a training logs: TensorBoard, MLflow, and Weights & Biases."""

from __future__ import annotations

import importlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trec_twotower.errors import ConfigError
from trec_twotower.model.step_diagnostics import Histogram
from trec_twotower.storage.atomic import naming, read_json, write_json

Values = Mapping[str, float | Histogram]
PROJECT = "trec_twotower"  # name of the MLflow experiment and of the W&B project


class Tracker(ABC):
    """Receives the metrics of steps. A resumed run continues in the tracker after `step`."""

    @abstractmethod
    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Open the tracker of a run directory; `settings` is the flat config. Raises ConfigError if it cannot be."""

    @abstractmethod
    def log(self, step: int, values: Values) -> None:
        """Log metrics by name, such as train/loss, after a step."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left."""


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard: numbers and histograms."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder / "tensorboard"
        with naming(self.folder):
            self.board = SummaryWriter(str(self.folder), purge_step=step + 1)

    def log(self, step: int, values: Values) -> None:
        if not self.folder.is_dir():  # moved: TensorBoard's thread opens its file by name, and would raise
            return
        with naming(self.folder):
            for name, value in values.items():
                if isinstance(value, Histogram):
                    self._add_histogram(name, value, step)
                else:
                    self.board.add_scalar(name, value, step)
            self.board.flush()

    def close(self) -> None:
        with naming(self.folder):
            self.board.close()

    def _add_histogram(self, name: str, histogram: Histogram, step: int) -> None:
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


class MLflow(Tracker):
    """A run on the server of MLFLOW_TRACKING_URI. Its id is kept in RUN/mlflow.json.

    Histograms are left out, and recall@10 becomes recall_at_10, as MLflow has no @ in names.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        mlflow = _imported("mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                "train.log_to has mlflow, but MLFLOW_TRACKING_URI is not set: set it to the address of the server, "
                "such as http://localhost:5000."
            )
        self._entities, self._error = mlflow.entities, mlflow.exceptions.MlflowException
        self._is_lost = False
        saved = folder / "mlflow.json"
        try:
            self.client = mlflow.MlflowClient()
            if saved.is_file():
                self.run_id = read_json(saved)["run_id"]
                self.client.update_run(self.run_id, status="RUNNING")
                return
            experiment = self.client.get_experiment_by_name(PROJECT)
            experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
            self.run_id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
            parameters = [self._entities.Param(name, str(value)[:500]) for name, value in settings.items()]
            for first in range(0, len(parameters), 100):  # the most that one call accepts
                self.client.log_batch(self.run_id, params=parameters[first : first + 100])
        except self._error as error:
            raise ConfigError(f"MLflow at {os.environ['MLFLOW_TRACKING_URI']} cannot be used: {error}") from None
        write_json(saved, {"run_id": self.run_id})

    def log(self, step: int, values: Values) -> None:
        if self._is_lost:
            return
        numbers = {name: value for name, value in values.items() if not isinstance(value, Histogram)}
        metrics = [
            self._entities.Metric(name.replace("@", "_at_"), float(value), 0, step) for name, value in numbers.items()
        ]
        try:
            self.client.log_batch(self.run_id, metrics=metrics)
        except self._error as error:  # a training does not end because a server is down
            self._is_lost = True
            warnings.warn(f"MLflow gets no further metrics of this training: {error}", stacklevel=2)

    def close(self) -> None:
        if not self._is_lost:
            self.client.set_terminated(self.run_id)


class WeightsAndBiases(Tracker):
    """A run of project trec_twotower, or WANDB_PROJECT, by wandb's own settings such as WANDB_MODE=offline.

    Its id is kept in RUN/wandb.json. Histograms are logged as such.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._wandb = _imported("wandb")
        saved = folder / "wandb.json"
        run_id = read_json(saved)["run_id"] if saved.is_file() else None
        try:
            self.run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=run_id,
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=dict(settings),
            )
        except self._wandb.errors.Error as error:
            raise ConfigError(f"Weights & Biases cannot be used: {error}") from None
        write_json(saved, {"run_id": self.run.id})

    def log(self, step: int, values: Values) -> None:
        self.run.log({name: self._as_logged(value) for name, value in values.items()}, step=step, commit=True)

    def close(self) -> None:
        self.run.finish()

    def _as_logged(self, value: float | Histogram) -> Any:
        if isinstance(value, Histogram):
            return self._wandb.Histogram(np_histogram=(value.counts.tolist(), value.edges.tolist()))
        return value


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"train.log_to has {name}, which is not installed: pip install 'trec-twotower[{name}]'"
        ) from None
