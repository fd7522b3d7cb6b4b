"""Checkpoints of a run: written as new folders, verified, resumed from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from trec_twotower.distributed import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.files import MANIFEST, open_sealed, publish_folder, read_json, seal, sha256_of, write_json
from trec_twotower.optimizer import RunOptimizer

MEND = "remove this checkpoint; the run goes on from the one before it."


class Checkpoints:
    """The folder checkpoints/ of a run: step-00000100/ and so on, of which some are kept."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 2) -> None:
        self.folder = folder
        self.ranks = ranks
        self.keep = keep

    def save(self, step: int, model: nn.Module, optimizer: RunOptimizer, facts: dict[str, Any]) -> Path:
        """Write the state after `step` steps; an interrupted save leaves the earlier checkpoints as they were."""
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{path.name}.tmp"
        self.ranks.once(lambda: self._begin(temporary))
        dcp.save(_state(model, optimizer), storage_writer=FileSystemWriter(temporary, overwrite=False))
        self.ranks.once(
            lambda: self._finish(temporary, path, {"step": step, "num_ranks": self.ranks.num_ranks, **facts})
        )
        return path

    def _begin(self, temporary: Path) -> None:
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)

    def _finish(self, temporary: Path, path: Path, facts: dict[str, Any]) -> None:
        seal(temporary, facts)
        publish_folder(temporary, path)

    def mark_best(self, step: int, metric: str, value: float) -> None:
        self.ranks.once(lambda: write_json(self.folder / "best.json", {"step": step, "metric": metric, "value": value}))

    def best(self) -> dict[str, Any] | None:
        path = self.folder / "best.json"
        return read_json(path) if path.is_file() else None

    def sweep(self) -> None:
        """Take away all checkpoints but the newest `keep` and the best."""

        def remove() -> None:
            best = self.best()
            for path in self.complete()[: -self.keep]:
                if best is None or path != self.path(best["step"]):
                    shutil.rmtree(path)

        self.ranks.once(remove)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def complete(self) -> list[Path]:
        """Every whole checkpoint, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / MANIFEST).is_file())

    def newest(self) -> Path | None:
        paths = self.ranks.once(self.complete)
        return paths[-1] if paths else None

    def choose(self, which: str) -> Path:
        """The checkpoint a later stage works on: "best" (the newest where none was evaluated), "newest" or a step."""
        best = self.best()
        if which == "best" and best is not None and self.path(best["step"]).is_dir():
            return self.path(best["step"])
        if which in ("best", "newest"):
            newest = self.newest()
            if newest is None:
                raise ConfigError(f"{self.folder} holds no complete checkpoint: train first.")
            return newest
        if which.isdigit() and self.path(int(which)).is_dir():
            return self.path(int(which))
        steps = [int(path.name.removeprefix("step-")) for path in self.complete()]
        raise ConfigError(
            f"There is no checkpoint {which!r} in {self.folder}: use best, newest, or one of the steps {steps}."
        )

    def load(self, path: Path, model: nn.Module, optimizer: RunOptimizer | None = None) -> dict[str, Any]:
        """Fill the model (and the optimizer) from a checkpoint, in place; returns its manifest.

        Raises DataError when a file is missing or altered.
        """
        manifest = self.ranks.once(lambda: open_sealed(path, MEND))
        state = _state(model, optimizer)
        dcp.load(state, storage_reader=FileSystemReader(path))
        model.load_state_dict(state["model"])
        return manifest


def model_version(checkpoint: Path) -> str:
    """Twelve hex digits that name these weights and no others."""
    return sha256_of(checkpoint / MANIFEST)[:12]


def _state(model: nn.Module, optimizer: RunOptimizer | None) -> dict[str, Any]:
    """Tensors alone; they are the live ones, so that loading writes into the model."""
    state: dict[str, Any] = {"model": dict(model.state_dict())}
    if optimizer is not None:
        state["optimizer"] = {
            name: {
                part: value
                for part, value in values.items()
                if isinstance(value, torch.Tensor) or hasattr(value, "local_shards")
            }
            for name, values in optimizer.state().items()
        }
    return state
