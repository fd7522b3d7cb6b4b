"""The code blocks of docs/tutorial.md, and a shell that runs them in order."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/tutorial.md"
PORT = "8000"  # as the page has it
MARK = "---- end of block"


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page: language and content."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_page(text: str, folder: Path, timeout_s: int) -> list[str]:
    """Run the commands of a page in one shell, and return what each block printed.

    A block of Python is a file, whose name is in its first line.
    """
    bin_dir = folder / "bin"
    bin_dir.mkdir()
    for name, options in (("python", ""), ("trec-twotower", "-m trec_twotower ")):
        (bin_dir / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {options}"$@"\n')
        (bin_dir / name).chmod(0o755)
    port, script = free_port(), ["set -e"]
    for language, block in blocks_of(text):
        if language == "python":
            name = re.match(r"# ([\w.-]+):", block)
            assert name is not None, "a block of Python begins with `# FILE: what it does`"
            (folder / name[1]).write_text(block)
        elif language == "bash":
            script += [block.replace(PORT, str(port)), f"echo '{MARK}'"]
    environ = {
        **os.environ,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    shell = subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = shell.communicate(timeout=timeout_s)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)  # the server too, if it is still there
            shell.wait()
    assert shell.returncode == 0, printed
    return printed.replace(str(port), PORT).split(f"{MARK}\n")[:-1]
