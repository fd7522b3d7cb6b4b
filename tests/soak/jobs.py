"""Trainings that leave behind which rows entered which step, and what must be compared of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ranks.forked import Ended, in_child
from tests.ranks.forked import Job as ForkedJob

__all__ = ["Ended", "History", "Job", "difference", "in_child", "last_sign", "newest_files"]
ROW_UNIT = 1024  # a row's number stands in its features as number / 1024, which float32 holds


class Job(ForkedJob):
    """`trec-twotower ARGUMENTS` on some ranks; SOAK_AUDIT, SOAK_STATES and SOAK_PLANT of `environ` as below."""

    def __init__(
        self, num_ranks: int, arguments: list[str], folder: Path, *, has_agent: bool = False, **environ: str
    ) -> None:
        def work(rank: int) -> int:
            from trec_twotower.cli import main

            if "SOAK_AUDIT" in environ:
                record(Path(environ["SOAK_AUDIT"]), rank)
            if "SOAK_STATES" in environ:
                record_states(Path(environ["SOAK_STATES"]))
            if "SOAK_PLANT" in environ:
                plant_nan(*environ["SOAK_PLANT"].split(":"), rank)
            return main(arguments)

        super().__init__(num_ranks, work, folder, environ, has_agent=has_agent)


# The audit: which rows entered which step, and what the loss was


def record(folder: Path, rank: int) -> None:
    """From here on each step of this process leaves a line: its number, its loss and its rows."""
    from trec_twotower.training.loop import Trainer

    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / f"{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    forward = Trainer._forward

    def recording(trainer: Trainer, batch: Any) -> Any:
        loss = forward(trainer, batch)
        rows = [round(value * ROW_UNIT) for value in batch.user_number_BN[:, 0].tolist()]
        line = {"step": trainer.state.step + 1, "loss": float(trainer.monitor.agreed[-1]).hex(), "rows": rows}
        os.write(file, (json.dumps(line) + "\n").encode())
        return loss

    Trainer._forward = recording  # type: ignore[method-assign]


def record_states(folder: Path) -> None:
    """From here on each save and each load leaves a digest of every tensor, put together from all ranks."""
    import hashlib

    from tests.ranks.states import whole_optimizer_state, whole_state
    from trec_twotower.training.checkpoints.checkpoint import Checkpoints

    folder.mkdir(parents=True, exist_ok=True)
    save, load = Checkpoints.save, Checkpoints.load

    def note(what: str, step: int, checkpoints: Checkpoints, model: Any, optimizer: Any) -> None:
        ranks = checkpoints.ranks
        tensors = {**whole_state(model, ranks), **whole_optimizer_state(optimizer, ranks)}
        if ranks.is_first:
            digests = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()}
            (folder / f"{what}-{step}.json").write_text(json.dumps(digests))

    def saving(checkpoints: Checkpoints, step: int, model: Any, optimizer: Any, facts: Any) -> Path:
        note("saved", step, checkpoints, model, optimizer)
        return save(checkpoints, step, model, optimizer, facts)

    def loading(checkpoints: Checkpoints, path: Path, model: Any, optimizer: Any = None) -> Any:
        manifest = load(checkpoints, path, model, optimizer)
        note("loaded", manifest["step"], checkpoints, model, optimizer)
        return manifest

    Checkpoints.save, Checkpoints.load = saving, loading  # type: ignore[method-assign]


def plant_nan(what: str, step: str, planted_rank: str, rank: int) -> None:
    """NaN in the loss or in the gradient of one rank at one step."""
    import torch

    from trec_twotower.model.two_tower import TwoTower

    if rank != int(planted_rank):
        return
    forward = TwoTower.forward
    calls = 0

    def broken(model: TwoTower, batch: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = forward(model, batch, **more)
        if calls == int(step):
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    TwoTower.forward = broken  # type: ignore[method-assign]


@dataclass
class History:
    """What became of a run in the end: of each step what the last attempt at it took."""

    losses: dict[int, set[str]] = field(default_factory=dict)
    rows: dict[int, Counter[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, attempts: list[Path]) -> History:
        """From the audit folders of all attempts, in order."""
        history = cls()
        for folder in attempts:
            lines = [
                json.loads(line)
                for path in sorted(folder.glob("*.jsonl"))
                for line in path.read_text().split("\n")[:-1]  # a line that was cut short has no end
            ]
            first = min((line["step"] for line in lines), default=None)
            if first is not None:
                for kept in (history.losses, history.rows):
                    for step in [step for step in kept if step >= first]:
                        del kept[step]  # an attempt that went back to a checkpoint undoes what came after it
            for line in lines:
                history.losses.setdefault(line["step"], set()).add(line["loss"])
                history.rows.setdefault(line["step"], Counter()).update(line["rows"])
        return history

    def all_rows(self) -> Counter[int]:
        return sum(self.rows.values(), Counter())


def difference(calm: History, found: History) -> tuple[int, int]:
    """How many rows `found` lost and how many it took twice."""
    expected, taken = calm.all_rows(), found.all_rows()
    return sum((expected - taken).values()), sum((taken - expected).values())


def last_sign(audit: Path) -> float:
    """When, by the wall clock, the last rank to take a step took it."""
    return max(path.stat().st_mtime for path in audit.glob("*.jsonl"))


def newest_files(run_dir: Path) -> dict[str, str]:
    """The digests of the newest checkpoint's tensors: equal bits, equal digests."""
    newest = sorted((run_dir / "checkpoints").glob("step-*/manifest.json"))[-1]
    files = json.loads(newest.read_text())["files"]
    return {name: digest["sha256"] for name, digest in files.items() if name.endswith(".safetensors")}
