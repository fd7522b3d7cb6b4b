"""What is left behind for whoever looks for a failure: the rows of a step, what their features hold, past attempts."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trec_twotower.config.base import Side
from trec_twotower.config.schema import Schema
from trec_twotower.data.loading.batch import Batch
from trec_twotower.data.loading.streaming import Passes
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import TrainingError
from trec_twotower.model.embeddings import table_in
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.storage.atomic import naming, write_json
from trec_twotower.training.checkpoint import MODEL, state_of
from trec_twotower.training.optimizer import RunOptimizer

ATTEMPT = ".attempt.json"
DIVERGED = (
    "After step {step:,} {found}: the training has diverged, and this step is not saved. {newest} Lower "
    "train.optimizer.lr or dense_lr, in a new run_dir."
)
LARGEST = 1e18  # of a weight: the squares of a vector of larger ones exceed float32
_MEMORIES = ("model.queue.", "model.frequency.")  # no weights
ABSURD = 1e6  # weights and normalised numbers beyond it are named when a loss or gradient is not finite


class Attempts:
    """How often in a row a run has died without a new checkpoint; the first rank notes each step it comes to.

    A run that was told to stop, or has ended, has not died.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, most: int) -> None:
        self.path = run_dir / ATTEMPT
        self.ranks = ranks
        self.most = most
        self._file: int | None = None
        self._note: dict[str, Any] = {}

    def begin(self, step: int, passes: Passes) -> None:
        """Note a start at `step`; raises TrainingError on all ranks where too many before it got no further."""

        def look() -> list[int]:
            before = self._read()
            died_in = before.get("died_in", []) if before.get("from_step") == step else []
            if before.get("in_step"):  # which came after `step`, even where that attempt began before it
                died_in = [*died_in, before["in_step"]]
            if len(died_in) >= self.most:
                raise TrainingError(self._said(step, died_in, passes))
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            self._write({"from_step": step, "died_in": died_in, "in_step": None})
            return died_in

        self.ranks.once(look)

    def comes_to(self, step: int) -> None:
        if self._file is not None:
            self._write({**self._note, "in_step": step})

    def end(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_bytes()[: 1 << 16])
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, note: dict[str, Any]) -> None:
        assert self._file is not None
        self._note = note
        with naming(self.path):
            os.pwrite(self._file, json.dumps(note).encode().ljust(1024), 0)  # in place: it is written every step

    def _said(self, step: int, died_in: list[int], passes: Passes) -> str:
        last = died_in[-1]
        rows = "; ".join(map(str, passes.rows_of(last - 1))) or "rows of the newest files"
        return (
            f"This run has died {len(died_in)} times in a row without a new checkpoint since step {step:,}, in the "
            f"steps {', '.join(f'{each:,}' for each in died_in)}. Step {last:,} takes {rows}. Look at what its last "
            f"attempts said, mend it, and remove {self.path} to try again (or raise train.max_failures)."
        )


def dead_weights(model: nn.Module, optimizer: RunOptimizer) -> str | None:
    """What is wrong with the weights or optimizer states on this rank that training cannot come back from, if anything.

    That is a number that is NaN or infinite, or a weight so large that vectors made of it have no finite length.
    """
    for name, value in state_of(model, optimizer).items():
        if name.startswith(_MEMORIES):
            continue
        is_weight = name.startswith(MODEL)
        pieces = [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]
        for piece in pieces:
            if not piece.is_floating_point() or not piece.numel():
                continue
            low, high = (float(each) for each in piece.detach().aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                return f"{_place(name)} has numbers that are NaN or infinite"
            if is_weight and max(-low, high) > LARGEST:
                return f"{_place(name)} has numbers of up to {max(-low, high):.3g}, whose squares overflow"
    return None


def dead_vectors(model: TwoTower, batch: Batch, ranks: Ranks) -> str | None:
    """What is wrong with the vectors of a batch, if anything is; all ranks call together.

    That is vectors with NaN or infinity, or items of which none has a vector that is not zero, so that all score alike.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        vectors = {"users": model.encode_users(batch), "items": model.encode_items(batch)}
    model.train(was_training)
    counts = [int((~vector.isfinite()).sum()) for vector in vectors.values()]
    item_SD = vectors["items"]
    total = ranks.sum(np.array([*counts, int((item_SD != 0).sum()), item_SD.numel()]))
    for side, bad in zip(vectors, total[:2], strict=True):
        if bad:
            return f"the vectors of {side} have numbers that are NaN or infinite"
    return "the vectors of all items of its batch are zero" if total[3] and not total[2] else None


def _place(name: str) -> str:
    """A weight or state for people: table item, or its name in the model."""
    kind, _, rest = name.partition(".")
    table = table_in(rest.partition("/")[0])
    what = rest if table is None else f"table {table}"
    return what if kind == "model" else f"the optimizer's state of {what}"


def describe_step(
    folder: Path, ranks: Ranks, step: int, found: str, loss: Tensor, batch: Batch, passes: Passes
) -> None:
    """Write FOLDER/rank-0.json and so on: the step's rows by file, and what this rank's batch holds."""
    ranks.together(lambda: folder.mkdir(parents=True, exist_ok=True))
    content = {
        "step": step,
        "found": found,
        "rank": ranks.rank,
        "loss_here": _number(float(loss.detach())),
        "rows_of_all_ranks": [vars(rows) for rows in passes.rows_of(step - 1)],
        "features": _statistics(batch),
    }
    ranks.together(lambda: write_json(folder / f"rank-{ranks.rank}.json", content))


def suspects(schema: Schema, batch: Batch) -> list[str]:
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
    """Range and mean of every tensor of the batch, bag by bag; how many values are NaN or infinite."""
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
    """How many values there are, how many of them are no finite numbers, and least, most and mean of the others."""
    flat = values.detach().flatten().to("cpu", torch.float64)
    finite = flat[flat.isfinite()]
    described: dict[str, Any] = {"count": flat.numel(), "not_finite": flat.numel() - finite.numel()}
    if finite.numel():
        described |= {"least": float(finite.min()), "most": float(finite.max()), "mean": float(finite.mean())}
    return described


def _number(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
