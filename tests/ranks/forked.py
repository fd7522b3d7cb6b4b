"""Jobs whose ranks are forked from a process that has imported everything: a start costs a second, not eight.

That process must have no threads, so it trains, reads and loads nothing itself. `python -m tests.ranks.forked` is one
that starts jobs as a line of JSON on its standard input asks for.
"""

# ruff: noqa: F401

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 60.0
GRACE_S = 1.0  # for the ranks that are left when one has failed; torchrun ends them, too


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
    """`work(rank)` on some ranks, forked from here with `environ` for all; what it returns is the exit code."""

    def __init__(self, num_ranks: int, work: Callable[[int], int], folder: Path, environ: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.began = time.monotonic()
        around = {**environ, "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.pids = [
            _fork(work, rank, folder / f"rank-{rank}.txt", {**around, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(num_ranks)
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


def _fork(work: Callable[[int], int], rank: int, log: Path, environ: Mapping[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        _end_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(environ)
        code = work(rank)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get_ready() -> None:
    """Import what ranks need, and nothing that starts a thread."""
    from trec_twotower.cli import _quiet

    _quiet()
    import numpy as np
    import torch.distributed.optim
    import torch.utils.tensorboard

    import trec_twotower.evaluate
    import trec_twotower.export
    import trec_twotower.index
    import trec_twotower.train
    from trec_twotower.data.kernels import shuffle

    shuffle(np.arange(2, dtype=np.int32), np.uint64(0))  # numba prepares itself at its first kernel
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, f"a process that forks must have no threads: {threads}"


# A process that starts jobs for another


class Starter:
    """The process `python -m tests.ranks.forked`, and what it is asked."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        settings = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **environ}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.ranks.forked"],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        num_ranks: int,
        module: str,
        *arguments: object,
        folder: Path,
        timeout_s: float = PATIENCE_S,
        grace_s: float = 5.0,
        **environ: str,
    ) -> Ended:
        """`-m module` on some ranks, whose words go to files in `folder`; a job that hangs is an AssertionError."""
        wanted = {"num_ranks": num_ranks, "module": module, "arguments": [str(each) for each in arguments]}
        wanted |= {"folder": str(folder), "timeout_s": timeout_s, "grace_s": grace_s, "environ": environ}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        ended = Ended(**json.loads(self._process.stdout.readline()))
        assert ended.seconds < timeout_s, f"{module} on {num_ranks} ranks hung for {timeout_s} s:\n{ended.said}"
        return ended

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the tests' to hear; they close the input
    _end_with_parent()
    get_ready()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        wanted = json.loads(line)

        def work(rank: int, wanted: dict[str, Any] = wanted) -> int:
            sys.argv = [wanted["module"], *wanted["arguments"]]
            runpy.run_module(wanted["module"], run_name="__main__", alter_sys=True)
            return 0

        ended = Job(wanted["num_ranks"], work, Path(wanted["folder"]), wanted["environ"])
        answers.write(json.dumps(vars(ended.end(wanted["timeout_s"], wanted["grace_s"]))) + "\n")
        answers.flush()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _serve()
