"""torchrun that ends as its ranks did: `python -m trec_twotower.distributed.launcher TORCHRUN_ARGUMENTS`.

torch's own launcher answers every failure with exit code 1 and a traceback of itself. Here the exit code is
that of the rank that failed first, and a rank that could not speak for itself, having been killed, is named.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

AGENT_PID = "TREC_TT_AGENT_PID"  # as in preemption.py; this module also runs where the package is not installed

# What torch's agent logs whenever ranks fail or are stopped; this module prints it once, in one line.
_SAID_BY_US = ("failed (exitcode", "Sending process", "Received %s death signal", "Got termination signal")
_AGENT_LOGGERS = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
)
# Passed on to the ranks, which save and end.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(args: list[str] | None = None) -> int:
    """Run torchrun with `args`; the exit code is 0, that of the first failed rank, or 128 + the signal."""
    os.environ[AGENT_PID] = str(os.getpid())  # ranks do not outlive it
    with tempfile.TemporaryDirectory(prefix="trec-twotower-") as said_dir:
        os.environ["TREC_TT_SAID_DIR"] = (
            said_dir  # where ranks that find the same error agree on the rank that prints it
        )
        code = _run([f"--signals-to-handle={_SIGNALS}", *(sys.argv[1:] if args is None else args)])
        left = Path(said_dir) / "exit_code"  # written by ranks that were stopped by a signal and ended without failure
        return int(left.read_text()) if left.is_file() else code


def _run(args: list[str]) -> int:
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    for name in _AGENT_LOGGERS:
        logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith(_SAID_BY_US))
    try:
        run.run(run.parse_args(args))
    except ChildFailedError as failed:
        return _first_failure(failed.failures)
    except SignalException as stopped:
        return _say(f"stopped by {signal.Signals(stopped.sigval).name}", 128 + stopped.sigval)
    except KeyboardInterrupt:
        return _say("stopped by SIGINT", 128 + signal.SIGINT)
    except (RendezvousError, DistError) as apart:
        cause = (str(apart.__cause__ or apart).strip() or type(apart).__name__).splitlines()[0]
        question = "are all started, with the same NNODES and address, and is the port free and open?"
        return _say(f"the machines of this job did not find each other ({cause}): {question}", 1)
    return 0


def _first_failure(failures: dict[int, Any]) -> int:
    """Print which rank failed first; return the launcher's exit code."""
    rank, first = min(failures.items(), key=lambda failure: _order(failure[1]))
    if first.exitcode > 0:
        return _say(f"rank {rank} ended with exit code {first.exitcode}; see its message above", first.exitcode)
    name = first.signal_name()
    hint = " (often the kernel's answer to memory running out)" if -first.exitcode == signal.SIGKILL else ""
    return _say(f"rank {rank} (pid {first.pid}) was killed by {name}{hint}", 128 - first.exitcode)


def _order(failure: Any) -> tuple[bool, int, bool]:
    """Sort key, causes first: the agent ends the rest by SIGTERM, and a rank that lost a peer exits with 1.

    Timestamps are whole seconds, so ranks that failed in the same second are ordered by the kind of their failure.
    """
    stopped = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    echo = failure.exitcode in (1, -signal.SIGABRT)
    return stopped, failure.timestamp, echo


def _say(message: str, exit_code: int) -> int:
    print(f"torchrun: {message}.", file=sys.stderr, flush=True)
    return exit_code


def _main_process() -> NoReturn:
    """Run the launcher and end this process.

    Python sends itself SIGINT at exit if Ctrl-C came inside `exec(text)`, which dataclasses call while torch is
    imported, even when the KeyboardInterrupt was caught. os._exit keeps the exit code.
    """
    try:
        code = main()
    except KeyboardInterrupt:  # while torch was being imported
        code = _say("stopped by SIGINT", 128 + signal.SIGINT)
    if code == 128 + signal.SIGINT:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _main_process()
