"""What the command line prints besides results: one message for each mistake, by one rank, and the exit code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn, TextIO

from trec_twotower.storage.package_files import PACKAGE_DIR


def prepare_output() -> None:
    """Print characters that the terminal's encoding lacks as escapes, and each warning of this package as one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    show = warnings.showwarning

    def show_as_line(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if Path(filename).is_relative_to(PACKAGE_DIR):
            print(f"trec-twotower: warning: {message}", file=sys.stderr, flush=True)
        else:
            show(message, category, filename, *rest)

    warnings.showwarning = show_as_line  # type: ignore[assignment]


def leave(code: int) -> NoReturn:
    """End this process at once.

    gloo's threads outlive the process group where a sharded model still refers to it. One that lets go of its last
    tensor while the interpreter shuts down cannot get the interpreter's lock, and aborts the process. NCCL's
    group, left by an error, would wait for ranks that wait for this one.
    """
    with contextlib.suppress(OSError):  # nobody reads on, as with `| head`
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def is_unread(stream: TextIO) -> bool:
    """Return whether the stream is a pipe whose reader has gone."""
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except OSError:  # not a file of the system but a Python object that captures the output
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def print_once(message: str, is_own: bool = False) -> None:
    """Print a message to stderr; of the ranks of one job, which mostly find the same mistake, the first prints it.

    The ranks of a machine agree through files in a folder of their launcher. Under a launcher other than torchrun
    rank 0 prints, and every rank a message that `is_own`.
    """
    folder = _message_dir()
    if folder is not None:
        digest = hashlib.sha256(message.encode(errors="backslashreplace")).hexdigest()[:16]
        try:
            (folder / digest).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # the folder is gone or full: better printed twice than not at all
    elif os.environ.get("RANK", "0") != "0" and not is_own:
        return
    print(message, file=sys.stderr, flush=True)


def _message_dir() -> Path | None:
    """Return the folder in which the ranks that torchrun started on this machine agree who prints what."""
    given = os.environ.get("TREC_TT_SAID_DIR")  # by our own launcher, which removes it
    if given is not None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return None if given is None else Path(given)
    agent = os.getppid()
    try:
        started = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]  # pids come again
        folder = Path(tempfile.gettempdir()) / f"trec-twotower-{os.getuid()}-{agent}-{started}"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder


def code_for_launcher(exit_code: int) -> int:
    """Return the exit code: under the launcher 0, so that no rank is restarted; the real one is written to a file."""
    said_dir = os.environ.get("TREC_TT_SAID_DIR")
    if said_dir is None:
        return exit_code
    try:
        (Path(said_dir) / "exit_code").write_text(str(exit_code))
    except OSError:
        return exit_code
    return 0
