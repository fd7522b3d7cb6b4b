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
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 60.0
SERVED_GRACE_S = 10.0
GRACE_S = 1.0  # for the ranks that are left when one has failed; torchrun ends them, too


@dataclass
class Ended:
    """How the ranks of a job ended: exit codes, negative for signals; and what they said."""

    codes: list[int]
    first: int  # that of the first rank that failed, or 0
    out: str
    err: str
    seconds: float

    @property
    def code(self) -> int:
        """As of torchrun: that of the first rank that failed."""
        return self.first if self.first >= 0 else 128 - self.first

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def is_done(self) -> bool:
        return not any(self.codes)


class Job:
    """`work(rank)` on some ranks, forked from here with `environ` for all; what it returns is the exit code.

    With `has_agent` a process beside them keeps their addresses, as torchrun's agent does; else rank 0.
    """

    def __init__(
        self,
        num_ranks: int,
        work: Callable[[int], int],
        folder: Path,
        environ: Mapping[str, str],
        *,
        has_agent: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.began = time.monotonic()
        around = {**environ, "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        port = _free_port()
        around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._agent = None
        if has_agent:
            around["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            self._agent = _fork(lambda _: _keep_store(port), 0, folder / "agent", around)
        self.pids = [
            _fork(work, rank, folder / f"rank-{rank}", {**around, "RANK": str(rank), "LOCAL_RANK": str(rank)})
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
        failed_at, first = None, 0
        while self.is_running or failed_at is None:
            now = time.monotonic()
            if failed_at is None and any(self._status.values()):
                failed_at, first = now, min(self._status.values())
            elif not self.is_running:
                break
            if now > until or (failed_at is not None and now > failed_at + grace_s):
                self.kill(signal.SIGKILL)
            time.sleep(0.005)
        if self._agent is not None:
            os.kill(self._agent, signal.SIGKILL)
            os.waitpid(self._agent, 0)
        out, err = (
            "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"rank-*.{kind}")))
            for kind in ("out", "err")
        )
        codes = [self._status[rank] for rank in range(len(self.pids))]
        return Ended(codes, first, out, err, time.monotonic() - self.began)


def _fork(work: Callable[[int], int], rank: int, log: Path, environ: Mapping[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        _end_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, kind in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(f"{log}{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
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


def _keep_store(port: int) -> int:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store is not None:
        signal.pause()
    return 0


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

    import trec_twotower.evaluation.evaluator
    import trec_twotower.index
    import trec_twotower.inference.export
    import trec_twotower.training.loop
    from trec_twotower.ops.kernels import shuffle

    shuffle(np.arange(2, dtype=np.int32), np.uint64(0))  # numba prepares itself at its first kernel
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, f"a process that forks must have no threads: {threads}"


# A process that starts jobs for another


class Starter:
    """The process `python -m tests.ranks.forked`, and what it is asked; `folder` is for what ranks say."""

    def __init__(self, folder: Path, **environ: str) -> None:
        settings = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **environ}
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.ranks.forked"],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def job(self, num_ranks: int, module: str, *arguments: object, timeout_s: float = 120, **environ: str) -> Ended:
        """`-m module` on some ranks, to its end; an AssertionError where it hangs."""
        wanted = {"num_ranks": num_ranks, "module": module, "arguments": [str(each) for each in arguments]}
        wanted |= {"folder": str(self._folder), "timeout_s": timeout_s, "environ": environ}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        ended = Ended(**json.loads(self._process.stdout.readline()))
        assert ended.seconds < timeout_s, f"{module} on {num_ranks} ranks hung for {timeout_s} s:\n{ended.said}"
        return ended

    def run(self, *arguments: Any, **settings: Any) -> tuple[int, str]:
        """As `job`; gives the exit code that torchrun would end with, and what all ranks said."""
        ended = self.job(*arguments, **settings)
        return ended.code, ended.said

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

        folder = Path(tempfile.mkdtemp(dir=wanted["folder"]))
        ended = Job(wanted["num_ranks"], work, folder, wanted["environ"]).end(wanted["timeout_s"], SERVED_GRACE_S)
        answers.write(json.dumps(vars(ended)) + "\n")
        answers.flush()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _serve()
