"""Checkpoints of a run: new folders, written while the training continues; verified, and resumed from."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException

import trec_twotower
from trec_twotower.config.run_config import RunConfig, differences
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError, TrainingError
from trec_twotower.model.embeddings import table_in
from trec_twotower.storage.artifacts import SealedFolder, read_manifest, recover, remove_folder
from trec_twotower.storage.atomic import free_bytes
from trec_twotower.storage.fault_point import fault_point
from trec_twotower.storage.manifest import MANIFEST, sha256_of
from trec_twotower.training.checkpoints.checkpoint_io import PublishingWriter, Snapshot, TensorReader
from trec_twotower.training.optimizer import RunOptimizer

FORMAT = 3  # of a checkpoint's manifest, its files and the names in it
CLOSE_S = 20.0  # for a save that is under way when the training fails; its other ranks may be gone
MEND = "remove this checkpoint; the run continues from the one before it."
CHOICES = 20  # of a checkpoint, where those chosen before were removed by the training before they were open


class Checkpoints:
    """The folder checkpoints/ of a run: step-00000100/ and so on, of which some are kept.

    With `config`, checkpoints that were trained under other settings are refused.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        keep: int = 2,
        config: RunConfig | None = None,
        *,
        in_background: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is called on the first rank before a save writes and publishes; what it raises ends the save."""
        self.folder = folder
        self.ranks = ranks
        self.keep = keep
        self.config = config
        self.in_background = in_background
        self.check = check
        self._snapshot = Snapshot()
        self._group: dist.ProcessGroup | None = None
        self._save: _Save | None = None

    def save(self, step: int, model: nn.Module, optimizer: RunOptimizer, facts: dict[str, Any]) -> Path:
        """Write the state after `step` steps; an interrupted save leaves the earlier checkpoints as they were.

        In the background it returns when this rank's shards are copied: a failure is then raised by the next call, or
        by `wait`.
        """
        self.wait()
        self._snapshot.take(state_of(model, optimizer))
        fault_point("save:copied", step)
        if self._group is None:  # a group of its own, because its messages are independent of those of the training
            self._group = self.ranks.new_group()
        facts = {"format": FORMAT, "step": step, "num_ranks": self.ranks.num_ranks, **facts}
        file_name = f"rank-{self.ranks.rank:05d}-of-{self.ranks.num_ranks:05d}.safetensors"
        writer = PublishingWriter(self.path(step), facts, step, file_name, self.check, self._sweep)
        self._save = _Save(writer, self._snapshot, self._group, self.ranks.device)
        if self.in_background:
            self._save.start()
        else:
            self._save.run()
            self.wait()
        return self.path(step)

    @property
    def has_failed(self) -> bool:
        """Return whether the save in the background failed; `wait` then raises its error."""
        return self._save is not None and self._save.error is not None

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when no save is under way; raises TrainingError where one failed."""
        save = self._save
        if save is None:
            return
        if save.ident is not None:
            save.join(timeout_s)
            if save.is_alive():
                return
        self._save = None
        if save.error is not None:
            raise self._explained(save.writer, save.error)

    def close(self) -> None:
        """Let a save that is under way end, whatever becomes of it: the training is over."""
        with contextlib.suppress(Exception):
            self.wait(CLOSE_S)

    def _explained(self, writer: PublishingWriter, error: BaseException) -> BaseException:
        """Return the error of a save with a message on how to fix it."""
        rank, cause = self.ranks.rank, error
        if isinstance(error, CheckpointException):
            rank, wrapped = next(iter(error.failures.items()))
            cause = wrapped[0]
        if self.ranks.is_first:
            self.check()  # raises the cause of all other errors where the run directory was moved
            with contextlib.suppress(OSError):
                remove_folder(writer.temporary)
        if not isinstance(cause, OSError):
            return cause
        need = self._snapshot.num_bytes * self.ranks.num_ranks
        space = free_bytes(self.folder)  # which the first save may not have created yet
        room = (
            f"a checkpoint needs about {need:,} bytes and {space:,} are free; " if cause.errno == errno.ENOSPC else ""
        )
        return TrainingError(
            f"Rank {rank} could not write {cause.filename or writer.temporary} for the checkpoint of step "
            f"{writer.step:,} ({cause.strerror or cause}): {room}the earlier checkpoints are whole, and the same "
            "command continues from them once this is fixed."
        )

    def best(self) -> dict[str, Any] | None:
        """Return the step with the best evaluation according to the manifests: {"step", "metric", "value"}."""
        evaluated = [{"step": each["step"], **each["valid"]} for each in self._manifests() if each.get("valid")]
        alike = [each for each in evaluated if each["metric"] == evaluated[-1]["metric"]]
        return max(alike, key=lambda each: each["value"], default=None)  # of equal ones the first

    def _manifests(self) -> Iterator[dict[str, Any]]:
        """Return the manifests of all complete checkpoints, oldest first; a running training may remove some."""
        for path in self.complete():
            try:
                yield read_manifest(path, MEND, FORMAT)
            except DataError:
                if (path / MANIFEST).is_file():
                    raise

    def recover(self) -> None:
        """Restore the checkpoint that a killed save had renamed aside to replace it; for the trainer alone."""
        for aside in list(self.folder.glob(".step-*.old-*")):
            recover(self.folder / aside.name[1:].partition(".old-")[0])

    def _sweep(self) -> None:
        """Remove all checkpoints but the newest `keep` and the best. Of a link the target stays as it is."""
        best = self.best()
        for path in self.complete()[: -self.keep]:
            if best is None or path != self.path(best["step"]):
                if not path.is_symlink():
                    # Without its manifest it is no checkpoint any more, however far the removal gets.
                    (path / MANIFEST).unlink()
                remove_folder(path)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def complete(self) -> list[Path]:
        """Return the folders of all complete checkpoints, oldest first."""
        found = (path for path in self.folder.glob("step-*") if path.name[len("step-") :].isdigit())
        return sorted((path for path in found if (path / MANIFEST).is_file()), key=_step_of)

    def newest(self) -> Path | None:
        paths = self.ranks.once(self.complete)
        return paths[-1] if paths else None

    def choose(self, which: str) -> Path:
        """Return the checkpoint for a later stage: "best" (the newest if none was evaluated), "newest", or a step."""
        return self.ranks.once(lambda: self._chosen(which))

    def _chosen(self, which: str) -> Path:
        best = self.best() if which == "best" else None
        if best is not None:
            return self.path(best["step"])
        complete = self.complete()
        if which in ("best", "newest"):
            if not complete:
                raise ConfigError(f"{self.folder} holds no complete checkpoint: train first.")
            return complete[-1]
        if which.isdigit() and self.path(int(which)).is_dir():
            return self.path(int(which))
        steps = [_step_of(path) for path in complete]
        raise ConfigError(
            f"There is no checkpoint {which!r} in {self.folder}: use best, newest, or one of the steps {steps}."
        )

    def load(self, path: Path, model: nn.Module, optimizer: RunOptimizer | None = None) -> dict[str, Any]:
        """Fill the model (and the optimizer) from a checkpoint, in place; returns its manifest.

        Raises DataError when a file is missing or altered, ConfigError when it was trained under other settings, or
        its tensors are not laid out as this plan needs them.
        """
        reader = self.open(path)
        self._load(reader, model, optimizer)
        return reader.sealed.manifest

    def _load(self, reader: TensorReader, model: nn.Module, optimizer: RunOptimizer | None) -> None:
        path, manifest = reader.path, reader.sealed.manifest
        if self.config is not None and (found := differences(manifest.get("settings", {}), self.config)):
            raise ConfigError(
                f"{path} was trained under another config: {found}. Restore the old settings, or begin another run "
                f"with its weights: run_dir=... --init-from {self.folder.parent}"
            )
        state = state_of(model, optimizer)
        misfits = self._misfits(state, reader.sizes, is_whole=optimizer is not None)
        if misfits:
            parts = sorted({_table_of(name) or name for name in misfits})
            name, how = next(iter(misfits.items()))
            raise ConfigError(
                f"{path} cannot be resumed under this plan, because its state is laid out otherwise for "
                f"{', '.join(parts)} (such as {name}: {how}). Restore the old tables.*.sharding, or begin another "
                f"run with its weights alone: run_dir=... --init-from {self.folder.parent}"
            )
        self.fill(state, reader)
        model.load_state_dict({name: state[MODEL + name] for name in model.state_dict()})
        fault_point("load:filled", manifest["step"])

    def load_chosen(self, which: str, model: nn.Module) -> tuple[dict[str, Any], str]:
        """Fill the model from the checkpoint that `choose` names; returns its manifest and the model's version.

        A training may remove that checkpoint before it is open: then another choice is made.
        """
        for _ in range(CHOICES):
            path = self.choose(which)
            try:
                reader = self.open(path)
            except DataError:
                if self.ranks.once((path / MANIFEST).is_file):
                    raise
                continue
            self._load(reader, model, None)
            return reader.sealed.manifest, version_of(reader.sealed.sha256)
        raise DataError(f"Each checkpoint in {self.folder} was removed before it was open: try again.")

    def open(self, path: Path) -> TensorReader:
        """Open a checkpoint on every rank; each verifies its share of the files."""
        sealed = self.ranks.together(lambda: self._opened(path))
        if len(set(self.ranks.collect(sealed.sha256))) > 1:
            raise DataError(f"{path} was replaced while the ranks opened it: try again.")

        def verify() -> None:
            for name in sealed.names[self.ranks.rank :: self.ranks.num_ranks]:
                sealed.verify(name)

        self.ranks.together(verify)
        reader = self.ranks.together(lambda: TensorReader(sealed))
        fault_point("load:verified", sealed.manifest["step"])
        return reader

    @staticmethod
    def _opened(path: Path) -> SealedFolder:
        try:
            return SealedFolder.open(path, MEND, format=FORMAT, verified=False)
        except FileNotFoundError:
            raise DataError(f"{path / MANIFEST} is missing: {MEND}") from None

    def _misfits(self, state: dict[str, Any], there: Mapping[str, torch.Size], *, is_whole: bool) -> dict[str, str]:
        """Return the tensors that the checkpoint lacks or has in another size, and those that no rank has."""
        here: dict[str, tuple[int, ...]] = {}
        for sizes in self.ranks.collect({name: whole_size(value) for name, value in state.items()}):
            here |= sizes
        found = {}
        for name in sorted({*here, *there} if is_whole else here):
            ours, theirs = (_size(where[name]) if name in where else "not" for where in (here, there))
            if ours != theirs:
                found[name] = f"{ours} here, {theirs} there"
        return found

    def fill(self, state: dict[str, Any], reader: TensorReader) -> None:
        """Read into the tensors of `state`, each of which the checkpoint has in the same size; all ranks together."""
        try:
            planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is, and is not needed
                dcp.load(state, storage_reader=reader, planner=planner, no_dist=self.ranks.num_ranks == 1)
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            if isinstance(cause, DataError):
                raise cause from None
            found = f"{type(cause).__name__}: {cause}"
            raise DataError(f"Rank {rank} cannot read {reader.path} ({found}): {MEND}") from None


class _Save(threading.Thread):
    """One save, in the background or in the foreground."""

    def __init__(
        self, writer: PublishingWriter, snapshot: Snapshot, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.writer, self.snapshot, self.group, self.device = writer, snapshot, group, device
        self.error: BaseException | None = None  # a CheckpointException is no Exception

    def run(self) -> None:
        try:
            if self.device.type == "cuda":  # a new thread's is the first GPU, where every rank would take memory
                torch.cuda.set_device(self.device)
            state = self.snapshot.state_dict
            dcp.save(state, storage_writer=self.writer, planner=self.snapshot, process_group=self.group)
        except (Exception, CheckpointException) as error:  # for the training's own thread
            self.error = error


def versions() -> dict[str, str]:
    """Return the versions of the packages that write a checkpoint."""
    found = {"trec_twotower": trec_twotower.__version__, "python": platform.python_version()}
    for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def model_version(checkpoint: Path) -> str:
    """Return twelve hex digits that identify these weights."""
    return version_of(sha256_of(checkpoint / MANIFEST))


def version_of(manifest_sha256: str) -> str:
    """Return the model version for the digest of a checkpoint's manifest."""
    return manifest_sha256[:12]


MODEL, _OPTIMIZER = "model.", "optimizer."  # what the names of a checkpoint's tensors begin with


def state_of(model: nn.Module, optimizer: RunOptimizer | None) -> dict[str, Any]:
    """Return the tensors of a model and its optimizer by their names in a checkpoint, without a copy."""
    state: dict[str, Any] = {MODEL + name: value for name, value in model.state_dict().items()}
    if optimizer is not None:
        for name, parts in optimizer.state().items():
            for part, value in parts.items():
                if isinstance(value, torch.Tensor) or hasattr(value, "local_shards"):
                    state[f"{_OPTIMIZER}{name}/{part}"] = value
    return state


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def whole_size(value: Any) -> tuple[int, ...]:
    """Return the size of a tensor over all ranks."""
    return tuple(value.metadata().size if hasattr(value, "local_shards") else value.shape)


def _table_of(name: str) -> str | None:
    """Return the table to which a weight or state belongs."""
    table = table_in(name.removeprefix(MODEL).removeprefix(_OPTIMIZER).partition("/")[0])
    return None if table is None else f"table {table!r}"


def _size(size: Any) -> str:
    return " x ".join(f"{length:,}" for length in size) or "one number"
