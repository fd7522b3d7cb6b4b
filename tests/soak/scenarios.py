"""The faults, each tried so many times against a run that nobody disturbs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ranks.worlds import MIXED
from tests.soak.jobs import Ended, History, Job, difference, in_child, last_sign, newest_files
from tests.soak.world import NUM_STEPS, SAVE_EVERY, config, write_config, write_world
from trec_twotower.storage.fault_point import POINTS

ROOT = Path(__file__).resolve().parent.parent.parent
TORCHRUN_S = 9.0  # that an undisturbed one takes, most of it imports
STOPPED = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}


@dataclass
class Tally:
    """One line of the table."""

    fault: str
    wanted: int
    tried: int = 0
    exact: int = 0
    lost: int = 0  # rows
    doubled: int = 0
    silent: int = 0  # wrong without a word
    longest_s: float = 0.0  # from a signal, or a rank's silence, to the end of its job
    took_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return self.tried > 0 and self.exact == self.tried and not (self.lost or self.doubled or self.silent)

    def note(self, text: str) -> None:
        if len(self.notes) < 20:
            self.notes.append(text[-2000:])


class Run:
    """A run folder that is trained in attempts, with what each left."""

    def __init__(self, soak: Soak, name: str, **parts: Any) -> None:
        self.soak = soak
        self.folder = soak.folder / "runs" / name
        self.parts = parts
        self.audits: list[Path] = []

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self, num_ranks: int = 2, plan: Any = MIXED, init_from: Path | None = None, **environ: str) -> Job:
        number = len(self.audits)
        attempt = self.folder / f"attempt-{number}"
        self.audits.append(attempt / "audit")
        made = config(self.soak.world, self.run_dir, plan, **self.parts)
        write_config(attempt / "config.yaml", made)
        arguments = ["train", str(attempt / "config.yaml")]
        return Job(num_ranks, arguments, attempt, SOAK_AUDIT=str(self.audits[-1]), **environ)

    def finish(self, num_ranks: int = 2, **given: Any) -> Ended:
        return self.start(num_ranks, **given).end()

    @property
    def history(self) -> History:
        return History.of(self.audits)

    def judge(self, tally: Tally, tried: int, *, calm: Run | None = None) -> None:
        """Count the tries of a run that has come to its end as exact, if it came to that of the calm one."""
        calm = calm or self.soak.calm
        expected, found = calm.history, self.history
        lost, doubled = difference(expected, found)
        tally.lost += lost
        tally.doubled += doubled
        tally.tried += tried
        is_exact = found.losses == expected.losses and found.rows == expected.rows
        if is_exact and newest_files(self.run_dir) == newest_files(calm.run_dir):
            tally.exact += tried
            shutil.rmtree(self.folder)
        else:
            tally.silent += not is_exact
            unlike = [step for step in expected.losses if found.losses.get(step) != expected.losses[step]]
            tally.note(f"{self.folder}: lost {lost}, doubled {doubled}, losses differ from step {unlike[:1]}")


class Soak:
    """All faults; `share` of the tries of each, drawn by `seed`."""

    def __init__(self, folder: Path, share: float, seed: int) -> None:
        self.folder = folder
        self.share = share
        self.random = random.Random(seed)
        self.world = folder / "world"
        in_child(lambda: write_world(self.world))
        for name in ("first", "calm"):  # the first may have to compile its kernels, and takes long then
            self.calm = Run(self, name)
            ended = self.calm.finish()
            assert ended.is_done, ended.said
        self.calm_s = ended.seconds

    def tries(self, full: int) -> int:
        return max(1, round(full * self.share))


def kill_anywhere(soak: Soak) -> Tally:
    """kill -9 of one rank or of all at random instants, from the first import of a rank to its end."""
    tally = Tally("kill -9 of a rank or of all, at random instants", 120)
    wanted = soak.tries(120)
    number = 0
    while tally.tried < wanted:
        run = Run(soak, f"anywhere-{number}")
        number += 1
        kills = 0
        while tally.tried + kills < wanted and kills < 6:
            job = run.start()
            time.sleep(soak.random.uniform(0, 1.1 * soak.calm_s))
            if not job.is_running:
                job.end()
                break
            job.kill(signal.SIGKILL, soak.random.choice([[0], [1], [0, 1]]))
            kills += 1
            job.end()
        ended = run.finish()
        if not ended.is_done:
            tally.tried += kills
            tally.note(f"does not go on: {ended.said}")
            continue
        run.judge(tally, kills)
    return tally


def kill_at_points(soak: Soak) -> Tally:
    """kill -9 at every named point; those of a save come in `kill_in_save`."""
    points = [point for point in POINTS if not point.startswith(("save:", "stop:", "publish:"))]
    return _at_points(soak, "kill -9 at named points of start, load and step", points, 30)


def kill_in_save(soak: Soak) -> Tally:
    points = [point for point in POINTS if point.startswith("save:")]
    return _at_points(soak, "kill -9 inside a save, at named points", points, 100)


def _at_points(soak: Soak, name: str, points: list[str], full: int) -> Tally:
    tally = Tally(name, full)
    wanted = soak.tries(full)
    order = soak.random.sample(points, len(points))
    number = 0  # of the points in turn
    while tally.tried < wanted:
        run = Run(soak, f"points-{soak.random.randrange(10**9)}")
        struck = 0
        while tally.tried + struck < wanted and struck < 6:
            point = order[number % len(order)]
            step = ""
            if point.startswith(("step:", "save:")):
                left = [number for number in range(1, NUM_STEPS + 1) if number > _newest_step(run.run_dir)]
                if point.startswith("save:"):
                    left = [number for number in left if number % SAVE_EVERY == 0 or number == NUM_STEPS]
                if not left:
                    break  # through; the next chain goes on with the next point
                step = f":step{soak.random.choice(left[:4])}"
            elif point.startswith("load:") and _newest_step(run.run_dir) == 0:
                run.start(TREC_TT_FAULT=f"save:swept:step{SAVE_EVERY}:rank0").end()  # so that there is one to load
            rank = soak.random.choice(["", ":rank0"] if point in FIRST_RANK_ALONE else ["", ":rank0", ":rank1"])
            ended = run.start(TREC_TT_FAULT=point + step + rank).end()
            assert -signal.SIGKILL in ended.codes, f"{point}{step}{rank} did not strike: {ended.said[-900:]}"
            number += 1
            struck += 1
            if (run.run_dir / "checkpoints").is_dir():
                _check_all_whole(run.run_dir, tally)
        ended = run.finish()
        if ended.is_done:
            run.judge(tally, struck)
        else:
            tally.tried += struck
            tally.note(f"does not go on: {ended.said}")
    return tally


FIRST_RANK_ALONE = {"save:opened", "save:sealed", "save:published", "save:swept"}


def _newest_step(run_dir: Path) -> int:
    found = [int(path.parent.name[5:]) for path in run_dir.glob("checkpoints/step-*/manifest.json")]
    return max(found, default=0)


def _check_all_whole(run_dir: Path, tally: Tally) -> None:
    """Whatever has a manifest after a kill is what the manifest says."""
    from trec_twotower.storage.artifacts import SealedFolder
    from trec_twotower.training.checkpoints.checkpoint import FORMAT

    for path in run_dir.glob("checkpoints/step-*"):
        if (path / "manifest.json").is_file():
            SealedFolder.open(path, "", format=FORMAT)


def kill_within_save(soak: Soak) -> Tally:
    """kill -9 at a random instant after the temporary folder of a save has appeared."""
    tally = Tally("kill -9 inside a save, at random instants", 100)
    wanted = soak.tries(100)
    while tally.tried < wanted:
        run = Run(soak, f"within-{tally.tried}-{soak.random.randrange(10**9)}")
        kills = 0
        for _ in range(min(5, wanted - tally.tried)):
            job = run.start()
            skipped = soak.random.randrange(3)
            seen: set[str] = set()
            while job.is_running and len(seen) <= skipped:
                seen |= {path.name for path in run.run_dir.glob("checkpoints/.step-*.tmp")}
            time.sleep(soak.random.uniform(0, 0.02))
            if job.is_running:
                job.kill(signal.SIGKILL, soak.random.choice([[0], [1], [0, 1]]))
                kills += 1
            job.end()
            if (run.run_dir / "checkpoints").is_dir():
                _check_all_whole(run.run_dir, tally)
        ended = run.finish()
        if ended.is_done and kills:
            run.judge(tally, kills)
        elif not ended.is_done:
            tally.tried += kills
            tally.note(f"does not go on: {ended.said}")
    return tally


def stopped_rank(soak: Soak) -> Tally:
    """SIGSTOP: the other rank says who does not answer and at which step, within its timeout and 35 s."""
    tally = Tally("SIGSTOP of a rank", 5)
    timeout_s = 3
    for number in range(soak.tries(5)):
        rank, step = soak.random.randrange(2), soak.random.randrange(2, NUM_STEPS)
        run = Run(soak, f"stop-{number}", train={"timeout_s": timeout_s})
        ended = run.start(TREC_TT_FAULT=f"step:forward:step{step}:rank{rank}:stop").end()
        took_s = time.time() - last_sign(run.audits[-1])
        tally.longest_s = max(tally.longest_s, took_s)
        said = f"Rank {1 - rank} lost the others at step {step}"
        if said not in ended.said or ended.codes[1 - rank] != 1 or took_s > timeout_s + 35:
            tally.tried += 1
            tally.note(f"expected {said!r} within {timeout_s + 35} s: {took_s:.0f} s, {ended.codes} {ended.said}")
            continue
        again = run.finish()
        if again.is_done:
            run.judge(tally, 1)
        else:
            tally.tried += 1
            tally.note(again.said)
    return tally


def told_to_stop(soak: Soak) -> Tally:
    """SIGTERM, SIGUSR1 and Ctrl-C to one rank or all: a checkpoint, a status, an exit code, soon; exact afterwards."""
    tally = Tally("SIGTERM, SIGUSR1 or Ctrl-C to a rank or to all, gone within 10 s", 45)
    for number in range(soak.tries(45)):
        run = Run(soak, f"told-{number}")
        told = list(STOPPED)[number % len(STOPPED)]
        step = soak.random.randrange(1, NUM_STEPS)
        ranks = soak.random.choice(["", ":rank0", ":rank1"])
        action = {signal.SIGTERM: "term", signal.SIGUSR1: "usr1", signal.SIGINT: "int"}[told]
        point = soak.random.choice(["step:forward", "step:backward", "step:updated"])
        ended = run.start(TREC_TT_FAULT=f"{point}:step{step}{ranks}:{action}").end()
        took_s = time.time() - last_sign(run.audits[-1])
        tally.longest_s = max(tally.longest_s, took_s)
        stopped_at = step + (point != "step:forward")
        path = run.run_dir / "status.json"
        status = json.loads(path.read_text()) if path.is_file() else {}
        if stopped_at >= NUM_STEPS:  # it was through before it could stop
            is_told = ended.is_done and status.get("state") == "finished"
        else:
            wanted = {"state": "stopped", "step": stopped_at, "exit_code": STOPPED[told]}
            is_told = ended.codes == [STOPPED[told]] * 2 and wanted.items() <= status.items()
            is_told = is_told and _newest_step(run.run_dir) == stopped_at
        again = run.finish()
        if is_told and again.is_done and took_s < 10:
            run.judge(tally, 1)
        else:
            tally.tried += 1
            tally.note(f"{point} {step} {action}{ranks}: {took_s:.0f} s {ended.codes} {status} {ended.said[-800:]}")
    return tally


def other_ranks(soak: Soak) -> Tally:
    """1 -> 2 -> 4 -> 1 ranks with other plans, beside one rank that is never disturbed.

    What N ranks saved is, put together, bit for bit what M ranks then have loaded: weights, Adagrad's and Adam's
    states. The same rows come in the same steps, and the losses are equal but for the order of sums (without dropout,
    which each rank draws for itself).
    """
    tally = Tally("ranks 1 -> 2 -> 4 -> 1, plans changed", 12)
    plans = ["table_wise", "row_wise", "table_row_wise"]
    parts = {"model": {"user_tower": {"mlp": [10]}}}
    calm = Run(soak, f"calm-{soak.random.randrange(10**9)}", **parts)
    ended = calm.finish(1)
    assert ended.is_done, ended.said
    while tally.tried < max(4, soak.tries(12)):
        run = Run(soak, f"ranks-{soak.random.randrange(10**9)}", **parts)
        stops = sorted(soak.random.sample(range(2, NUM_STEPS - 1), 3))
        states = run.folder / "states"
        tally.tried += 4
        for place, num_ranks in enumerate((1, 2, 4, 1)):
            fault = {"TREC_TT_FAULT": f"step:forward:step{stops[place]}:rank0:term"} if place < 3 else {}
            ended = run.finish(num_ranks, plan=soak.random.choice(plans), SOAK_STATES=str(states), **fault)
            if ended.codes != [143 if place < 3 else 0] * num_ranks:
                break
        if not ended.is_done:
            tally.note(ended.said)
            continue
        saved, loaded = ([states / f"{what}-{step}.json" for step in stops] for what in ("saved", "loaded"))
        are_equal = [one.read_text() == other.read_text() for one, other in zip(saved, loaded, strict=True)]
        expected, found = calm.history, run.history
        lost, doubled = difference(expected, found)
        tally.lost += lost
        tally.doubled += doubled
        gap = max(
            abs(float.fromhex(min(found.losses[step])) / float.fromhex(min(losses)) - 1)
            for step, losses in expected.losses.items()
        )
        if expected.rows == found.rows and gap < 1e-4 and all(are_equal):
            tally.exact += 4
            shutil.rmtree(run.folder)
        else:
            tally.silent += 4
            order = expected.rows == found.rows
            tally.note(f"{run.folder}: gap {gap}, tensors equal {are_equal}, order equal {order}")
    return tally


def planted_nan(soak: Soak) -> Tally:
    """NaN in the loss or the gradient of one rank: all stop together, the last checkpoint is finite and goes on."""
    tally = Tally("NaN in one rank's loss or gradient", 5)
    for number in range(soak.tries(5)):
        what, step, rank = soak.random.choice(["loss", "gradient"]), soak.random.randrange(2, NUM_STEPS), number % 2
        run = Run(soak, f"nan-{number}")
        ended = run.start(SOAK_PLANT=f"{what}:{step}:{rank}").end()
        folder = run.run_dir / f"not-finite-step-{step:08d}"
        left = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
        taken = sum(len(rows["rows"]) for rows in left[0]["rows_of_all_ranks"]) if left else 0
        is_good = ended.codes == [1, 1] and len(left) == 2 and taken == sum(soak.calm.history.rows[step].values())
        again = run.finish()
        if is_good and again.is_done:
            run.judge(tally, 1)
        else:
            tally.tried += 1
            tally.note(f"{what} {step} {rank}: {ended.codes}, {len(left)} reports, {taken} rows; {ended.said[-800:]}")
    return tally


def simultaneous_starts(soak: Soak) -> Tally:
    """Several starts on one run folder: one trains, the others are told who."""
    tally = Tally("simultaneous starts on one run folder", 20)
    for number in range(soak.tries(20)):
        run = Run(soak, f"together-{number}", train={"epochs": 400})
        jobs = [run.start(1) for _ in range(3)]
        until = time.monotonic() + 60
        while sum(job.is_running for job in jobs) > 1 and time.monotonic() < until:
            time.sleep(0.02)
        running = [job for job in jobs if job.is_running]
        refused = [job.end() for job in jobs if job not in running]
        for job in running:
            job.kill(signal.SIGKILL)
            job.end()
        said_so = all(ended.codes == [2] and "is being trained by process" in ended.said for ended in refused)
        tally.tried += 1
        if len(running) == 1 and said_so:
            tally.exact += 1
            shutil.rmtree(run.folder)
        else:
            tally.note(f"{len(running)} ran; {[ended.said[-300:] for ended in refused]}")
    return tally


def under_torchrun(soak: Soak) -> Tally:
    """Real torchrun, from its first import on: kill -9 of the launcher, whose ranks end too; of ranks, which it starts
    again; and of any at random instants."""
    tally = Tally("torchrun: kill -9 of the launcher, a rank or all; restarts", 14)
    kinds = ["launcher at a point", "rank at a point", "a rank", "the launcher", "all"]
    soak.random.shuffle(kinds)
    for number in range(soak.tries(14)):
        run = Run(soak, f"torchrun-{number}")
        kind = kinds[number % len(kinds)]
        step = soak.random.randrange(2, NUM_STEPS)
        fault = f"step:{soak.random.choice(['forward', 'backward'])}:step{step}:rank{soak.random.randrange(2)}"
        if kind == "launcher at a point":
            first = _torchrun(run, TREC_TT_FAULT=f"{fault}:agent")
        elif kind == "rank at a point":
            first = _torchrun(run, TREC_TT_FAULT=fault)
        else:
            first = _torchrun(run, (kind, soak.random.uniform(0, TORCHRUN_S), soak.random))
        _wait_for_lock(run.run_dir)
        again = first if kind == "rank at a point" else _torchrun(run)
        if again.returncode == 0:
            run.judge(tally, 1)
        else:
            tally.tried += 1
            tally.note(f"{kind} {fault}: {first.returncode} {first.stdout[-600:]}; {again.stdout[-600:]}")
    return tally


def _torchrun(
    run: Run, strike: tuple[str, float, random.Random] | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """A run under torchrun whose ranks leave an audit: one folder for each attempt.

    `strike` is what is killed when: the launcher, a rank, or all of them.
    """
    attempt = run.folder / f"attempt-{len(run.audits)}"
    made = config(run.soak.world, run.run_dir, **run.parts)
    write_config(attempt / "config.yaml", made)
    out = attempt / "said.txt"
    command = [sys.executable, "-m", "trec_twotower.distributed.launcher", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc-per-node=2", "--max-restarts=2", "-m", "tests.soak.rank", "train"]
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}  # as torchrun.sh has
    # To a file and not to a pipe, which ranks that outlive their launcher would keep open.
    with out.open("w") as file:
        job = subprocess.Popen(
            [*command, str(attempt / "config.yaml")],
            env={**os.environ, **settings, "SOAK_AUDITS": str(attempt), **environ},
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        try:
            if strike is not None:
                _strike(job, *strike)
            job.wait(120)
        finally:
            job.kill()
            job.wait()
    run.audits += sorted(attempt.glob("restart-*")) or [attempt / "nothing"]
    return subprocess.CompletedProcess([], job.returncode, out.read_text())


def _strike(job: subprocess.Popen[bytes], target: str, after_s: float, drawn: random.Random) -> None:
    time.sleep(after_s)
    ranks = []
    with contextlib.suppress(OSError):  # it was through
        for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
            if b"tests.soak.rank" in Path(f"/proc/{pid}/cmdline").read_bytes():
                ranks.append(int(pid))
    chosen = {"a rank": drawn.sample(ranks, min(1, len(ranks))), "the launcher": [job.pid], "all": [job.pid, *ranks]}
    for pid in chosen[target] or [job.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait_for_lock(run_dir: Path) -> None:
    """Until the ranks whose launcher was killed have ended: the kernel has freed their lock, or they have."""
    import fcntl

    until = time.monotonic() + 30
    while time.monotonic() < until and (run_dir / ".lock").is_file():
        with (run_dir / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)


SCENARIOS: list[Callable[[Soak], Tally]] = [
    kill_anywhere,
    kill_at_points,
    kill_in_save,
    kill_within_save,
    under_torchrun,
    stopped_rank,
    told_to_stop,
    other_ranks,
    planted_nan,
    simultaneous_starts,
]
