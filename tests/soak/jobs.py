"""Trainings that are forked from a process which has imported everything: a start costs a second, not six.

The process that forks must have no threads, so it trains, reads and loads nothing itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0
GRACE_S = 1.0  # for the ranks that are left when one has failed; torchrun ends them, too
ROW_UNIT = 1024  # a row's number stands in its features as number / 1024, which float32 holds


@dataclass
class Ended:
    """How the ranks of a job ended: exit codes, negative for signals; and what they said."""

    codes: list[int]
    said: str
    seconds: float

    @property
    def is_done(self) -> bool:
        return not any(self.codes)


class Job:
    """`trec-twotower ARGUMENTS` on some ranks, forked from here, with `environ` for all of them."""

    def __init__(self, num_ranks: int, arguments: list[str], folder: Path, **environ: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.began = time.monotonic()
        port = _free_port()
        self.pids = [
            _fork(rank, num_ranks, port, arguments, folder / f"rank-{rank}.txt", environ) for rank in range(num_ranks)
        ]
        self._status: dict[int, int] = {}

    def kill(self, number: int, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if self._running(rank):
                os.kill(self.pids[rank], number)

    def _running(self, rank: int) -> bool:
        if rank not in self._status:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self._status[rank] = os.waitstatus_to_exitcode(status)
        return rank not in self._status

    @property
    def is_running(self) -> bool:
        return sum(self._running(rank) for rank in range(len(self.pids))) > 0  # looks at all of them

    def end(self, patience_s: float = PATIENCE_S, grace_s: float = GRACE_S) -> Ended:
        """Wait for all ranks; as torchrun does, end the others soon after one has failed."""
        until = time.monotonic() + patience_s
        failed_at = None
        while self.is_running:
            now = time.monotonic()
            if failed_at is None and any(self._status.values()):
                failed_at = now
            if now > until or (failed_at is not None and now > failed_at + grace_s):
                self.kill(signal.SIGKILL)
            time.sleep(0.005)
        said = "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank-*.txt")))
        return Ended([self._status[rank] for rank in range(len(self.pids))], said, time.monotonic() - self.began)


def in_child(work: Any, *arguments: Any) -> Any:
    """What `work` returns, as JSON, from a forked process."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(receive)
            with os.fdopen(send, "w") as file:
                json.dump(work(*arguments), file)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"{work.__name__} failed in its child")
    return json.loads(text)


def _fork(rank: int, num_ranks: int, port: int, arguments: list[str], log: Path, environ: Mapping[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        _end_with_parent()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(environ)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        os.environ.update(LOCAL_WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        from trec_twotower.cli import main

        audit = os.environ.get("SOAK_AUDIT")
        if audit is not None:
            record(Path(audit), rank)
        states = os.environ.get("SOAK_STATES")
        if states is not None:
            record_states(Path(states))
        plant = os.environ.get("SOAK_PLANT")
        if plant is not None:
            plant_nan(*plant.split(":"), rank)
        code = main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The audit: which rows entered which step, and what the loss was


def record(folder: Path, rank: int) -> None:
    """From here on each step of this process leaves a line: its number, its loss and its rows."""
    from trec_twotower.train import Progress

    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / f"{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    took = Progress.took

    def recording(progress: Progress, loss: Any, batch: Any) -> None:
        took(progress, loss, batch)
        rows = [round(value * ROW_UNIT) for value in batch.user_number_BN[:, 0].tolist()]
        line = {"step": progress.step + 1, "loss": float(progress.losses[-1]).hex(), "rows": rows}
        os.write(file, (json.dumps(line) + "\n").encode())

    Progress.took = recording  # type: ignore[method-assign]


def record_states(folder: Path) -> None:
    """From here on each save and each load leaves a digest of every tensor, put together from all ranks."""
    import hashlib

    from tests.ranks.states import whole_optimizer_state, whole_state
    from trec_twotower.checkpoint import Checkpoints

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

    def broken(model: TwoTower, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = forward(model, batch)
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
    return {name: digest["sha256"] for name, digest in files.items() if name.endswith(".distcp")}
