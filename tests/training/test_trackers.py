"""The trackers get the figures of metrics.jsonl, continue in the same run, and never end a training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from trec_twotower.errors import ConfigError
from trec_twotower.model.step_diagnostics import Histogram
from trec_twotower.training.diagnostics.trackers import MLflow, WeightsAndBiases

SETTINGS = {f"part.{number}": number for number in range(150)}  # more than one call accepts
HISTOGRAM = Histogram(np.linspace(0.0, 1.0, 4), np.array([1, 2, 3]))


@pytest.fixture
def run_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mlflow_continues_one_run_with_the_settings_as_parameters(run_folder):
    pytest.importorskip("mlflow")
    first = MLflow(run_folder, SETTINGS, 0)
    first.log(1, {"train/loss": 3.0, "train/scores": HISTOGRAM})
    first.close()
    resumed = MLflow(run_folder, SETTINGS, 1)
    assert resumed.run_id == first.run_id
    resumed.log(2, {"train/loss": 2.0, "valid/recall@10": 0.5})
    resumed.close()
    found = resumed.client.get_run(resumed.run_id)
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert found.data.params == {name: str(value) for name, value in SETTINGS.items()}
    history = resumed.client.get_metric_history(resumed.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0)]
    assert found.data.metrics["valid/recall_at_10"] == 0.5


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_lost_server_ends_the_logging_with_one_warning(run_folder, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    tracker = MLflow(run_folder, {}, 0)

    def down(*_: object, **__: object) -> None:
        raise mlflow.exceptions.MlflowException("server down")

    monkeypatch.setattr(tracker.client, "log_batch", down)
    with pytest.warns(UserWarning, match="no further metrics of this training: server down"):
        tracker.log(1, {"train/loss": 1.0})
    tracker.log(2, {"train/loss": 1.0})  # warnings are errors here
    tracker.close()


def test_mlflow_without_a_server_is_refused(run_folder, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set: set it to the address"):
        MLflow(run_folder, {}, 0)


@pytest.mark.parametrize(("kind", "name"), [(MLflow, "mlflow"), (WeightsAndBiases, "wandb")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(run_folder, monkeypatch, kind, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name}, which is not installed: pip install 'trec-twotower\[{name}\]'"):
        kind(run_folder, {}, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_writes_offline_and_continues_with_the_same_id(run_folder):
    pytest.importorskip("wandb")
    first = WeightsAndBiases(run_folder, {"train.epochs": 3}, 0)
    first.log(1, {"train/loss": 3.0, "train/scores": HISTOGRAM})
    assert first.run.config["train.epochs"] == 3 and first.run.summary["train/loss"] == 3.0
    first.close()
    resumed = WeightsAndBiases(run_folder, {"train.epochs": 3}, 1)
    assert resumed.run.id == first.run.id == json.loads((run_folder / "wandb.json").read_text())["run_id"]
    resumed.close()
    assert list((run_folder / "wandb").glob(f"offline-run-*-{first.run.id}/*.wandb"))  # named by the second
