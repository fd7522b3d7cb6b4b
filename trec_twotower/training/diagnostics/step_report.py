"""Report of a step that cannot be trained on: its rows, and what its features hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trec_twotower.config.base import Side
from trec_twotower.config.schema import Schema
from trec_twotower.data.loading.batch import Batch
from trec_twotower.data.loading.streaming import TrainData
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.storage.atomic import write_json

ABSURD = 1e6  # row weights and normalised numbers beyond it are named when a loss or gradient is not finite


def write_step_report(
    folder: Path, ranks: Ranks, step: int, found: str, loss: float, batch: Batch, data: TrainData
) -> None:
    """Write FOLDER/rank-0.json and so on: the step's rows by file, and what this rank's batch holds."""
    ranks.together(lambda: folder.mkdir(parents=True, exist_ok=True))
    content = {
        "step": step,
        "found": found,
        "rank": ranks.rank,
        "loss_here": _number(loss),
        "rows_of_all_ranks": [vars(rows) for rows in data.rows_of(step - 1)],
        "features": _statistics(batch),
    }
    ranks.together(lambda: write_json(folder / f"rank-{ranks.rank}.json", content))


def suspect_values(schema: Schema, batch: Batch) -> list[str]:
    """Return what in a batch is so large that it explains numbers which are not finite, each with its greatest value.

    Only values of the data are looked at: weights of rows, pairs and bags, and numbers as they enter the towers.
    """
    assert batch.targets is not None
    given = batch.targets.given
    values: list[tuple[str, Tensor | None]] = [
        ("row weights (column 'weight' of train/)", batch.targets.positive.weight_P),
        ("weights of loss.impressions", None if given is None else given.weight_P),
        ("labels of loss.impressions", None if given is None else given.label_P),
    ]
    for key in batch.sparse.keys():  # noqa: SIM118 - a list, not a dict
        side, _, name = key.partition(":")
        values.append((f"weights of the {side} feature {name!r}", batch.sparse[key].weights_or_none()))
    sides: tuple[tuple[Side, Tensor], ...] = (("user", batch.user_number_BN), ("item", batch.item_number_SN))
    for side, numbers in sides:
        column = 0
        for feature in schema.layout.float_features(side):
            part = numbers[:, column : column + feature.num_numbers]
            values.append((f"numbers of the {side} feature {feature.name!r}", part))
            column += feature.num_numbers
    found = []
    for name, value in values:
        most = float(value.detach().abs().max()) if value is not None and value.numel() else 0.0
        if not most <= ABSURD:
            found.append(f"the {name} reach {most:.3g}")
    return found


def _statistics(batch: Batch) -> dict[str, Any]:
    """Return range and mean of every tensor of the batch, feature by feature; how many values are not finite."""
    found: dict[str, Any] = {}
    for key in batch.sparse.keys():  # noqa: SIM118 - a list, not a dict
        bags = batch.sparse[key]
        found[key] = {"buckets": summary(bags.values()), "lengths": summary(bags.lengths())}
        weights = bags.weights_or_none()
        if weights is not None:
            found[key]["weights"] = summary(weights)
    if batch.sequences is not None:
        for key in batch.sequences.keys():  # noqa: SIM118
            found[key] = {"buckets": summary(batch.sequences[key].values())}
    return found | {name: summary(value) for name, value in batch.named_tensors().items()}


def summary(values: Tensor) -> dict[str, Any]:
    """Return the number of values, how many are not finite, and minimum, maximum and mean of the others."""
    flat = values.detach().flatten().to("cpu", torch.float64)
    finite = flat[flat.isfinite()]
    described: dict[str, Any] = {"count": flat.numel(), "not_finite": flat.numel() - finite.numel()}
    if finite.numel():
        described |= {"least": float(finite.min()), "most": float(finite.max()), "mean": float(finite.mean())}
    return described


def _number(value: float) -> float | str:
    """Return a number that JSON can hold: NaN as text."""
    return value if math.isfinite(value) else str(value)
