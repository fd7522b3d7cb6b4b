"""What a GPU makes of the same work: as a CPU does, within the order of its sums. Skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kinds import LOSS_PARAMETERS, build_loss
from tests.ranks.worlds import MIXED, event_config
from trec_twotower.config.base import as_values
from trec_twotower.config.data import DataConfig
from trec_twotower.config.loading import to_yaml
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.negatives.samplers import count_items
from trec_twotower.model.losses import LOSSES, Pairs, Relations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def relations_on(device: str) -> Relations:
    """Of 300 rows and 500 candidates, with given pairs, corrections, and columns that stand as positives alone."""
    rng = np.random.default_rng(3)

    def on(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(device, dtype)

    row, column = np.arange(300), rng.integers(0, 500, 300)
    known = np.stack([np.concatenate([row, rng.integers(0, 300, 900)]),
                      np.concatenate([column, rng.integers(0, 500, 900)])])  # fmt: skip
    given = np.unique(np.stack([rng.integers(0, 300, 400), rng.integers(0, 500, 400)]), axis=1)
    num_given = given.shape[1]
    return Relations(
        positive=Pairs(on(row, torch.int64), on(column, torch.int64), on(rng.random(300), torch.float32)),
        known=Pairs(*on(known, torch.int64)),
        given=Pairs(*on(given, torch.int64), on(rng.random(num_given), torch.float32),
                    on(rng.integers(0, 2, num_given), torch.float32)),
        log_q_C=on(np.log(rng.uniform(0.01, 1, 500)), torch.float32),
        is_negative_C=on(rng.random(500) < 0.9, torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_their_gradients_are_those_of_a_cpu(kind):
    parameters = dict(LOSS_PARAMETERS[kind])
    if "precision" in parameters:
        parameters["precision"] = "fp32"
    found = {}
    for device in ("cpu", "cuda"):
        random = torch.Generator().manual_seed(0)
        vectors = [torch.nn.functional.normalize(torch.randn(count, 16, generator=random)) for count in (300, 500)]
        user_BD, item_CD = (each.to(device).requires_grad_() for each in vectors)
        loss = LOSSES[kind](user_BD, item_CD, relations_on(device), **parameters)
        slopes = torch.autograd.grad(loss, (user_BD, item_CD))
        found[device] = [loss.detach().cpu(), *(slope.cpu() for slope in slopes)]
    for on_cpu, on_gpu in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-4, atol=2e-5)


def trained(world: Path, run_dir: Path, device: str, plan: Any = MIXED, **parts: Any) -> list[float]:
    """The losses of a run of its own process, step by step."""
    config = event_config(world, run_dir, plan, **parts)
    path = run_dir.with_suffix(".yaml")
    path.write_text(to_yaml(as_values(config)))
    environ = {**os.environ, "TREC_TWOTOWER_PRECISION": "fp32"}
    if device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    call = [sys.executable, "-m", "trec_twotower", "train", str(path), f"run_dir={run_dir}"]
    job = subprocess.run(call, env=environ, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(("sparse", "lr"), [("sgd", 0.5), ("rowwise_adagrad", 0.1), ("adagrad", 0.1)])
@pytest.mark.parametrize("pipeline", ["plain", "sparse_dist"])
def test_training_takes_the_steps_of_a_cpu(small_world, tmp_path, sparse, lr, pipeline):
    """First weights are a function of the seed on any device; updates add up in another order."""
    train = {"optimizer": {"sparse": sparse, "lr": lr}, "pipeline": pipeline}
    on_cpu, on_gpu = (trained(small_world, tmp_path / device, device, train=train) for device in ("cpu", "cuda"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert on_gpu[-1] != on_gpu[0]


@pytest.mark.parametrize("sparse", ["adam", "partial_rowwise_adam", "lamb"])
def test_optimizers_that_gpus_alone_have_lower_the_loss(small_world, tmp_path, sparse):
    train = {"epochs": 8, "optimizer": {"sparse": sparse, "lr": 0.02}}
    fused = {**MIXED, "country": "row_wise"}  # of data-parallel tables they refuse the update
    losses = trained(small_world, tmp_path / "run", "cuda", fused, train=train)
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_tables_in_host_memory_train_as_those_on_the_device(small_world, tmp_path, kernel):
    plain = trained(small_world, tmp_path / "plain", "cuda", "table_wise")
    tables = {name: {"kernel": kernel} for name in ("item", "tag")}
    assert trained(small_world, tmp_path / kernel, "cuda", "table_wise", tables=tables) == pytest.approx(
        plain, rel=1e-4
    )


def test_batches_are_pinned_and_their_copies_are_the_same(small_world):
    config = event_config(small_world, Path("nowhere"))
    sources = FeatureDataset(Dataset(small_world / "events"), config.feature_schema, "event")
    loss = build_loss(**{"negatives": {"sampled": 5}})
    data = DataConfig(dataset=small_world / "events", batch_size=16)
    batches = TrainBatches(sources, data, loss, count_items(sources, loss), (0, 1), pin_memory=True)
    stream = torch.cuda.Stream()
    for batch in batches.iter_from(0, 3):
        tensors = batch.named_tensors()
        assert all(value.is_pinned() for value in (*tensors.values(), batch.sparse.values(), batch.sparse.lengths()))
        with torch.cuda.stream(stream):
            copy = batch.to(torch.device("cuda"), non_blocking=True)
        torch.cuda.current_stream().wait_stream(stream)
        copy.record_stream(torch.cuda.current_stream())
        copied = copy.named_tensors()
        for name, value in tensors.items():
            assert torch.equal(copied[name].cpu(), value), name
        assert torch.equal(copy.sparse.values().cpu(), batch.sparse.values())
