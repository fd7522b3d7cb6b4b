"""Starting real ranks: torchrun, gloo, one thread each, and an end to them whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SAID_BY_TORCHREC = (  # warnings filters, for tests that shard a model in their own process
    "ignore:This API is deprecated. Please use Pytorch:DeprecationWarning",
    "ignore:.broadcast_buffers. is deprecated:FutureWarning",
    "ignore:Please use DTensor:FutureWarning",
    "ignore:._get_pg_default_device. will be deprecated:UserWarning",  # torchrec before 1.8
    "ignore:Multiple backends are registered with this ProcessGroup:UserWarning",
    "ignore:.torch.jit.[a-z]+. is deprecated:DeprecationWarning",
    "ignore:(?s)fbgemm.*an autograd kernel was not registered:UserWarning",  # the updates are tested
)
FATAL_BOUNDS = {"FBGEMM_TBE_BOUNDS_CHECK_MODE": "0"}  # an id outside its table is an error, not row 0


def torchrun(
    num_ranks: int, module: str, *arguments: str | Path, timeout_s: float = 120, **environ: str
) -> tuple[int, str]:
    """Run `-m module` on some ranks of this machine; gives the exit code, and what all of them said."""
    command = [sys.executable, "-m", "trec_twotower.distributed.launcher", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={num_ranks}", "-m", module, *map(str, arguments)]
    settings = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", **FATAL_BOUNDS}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **settings, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks
        try:
            said, _ = process.communicate(timeout=20)
        finally:
            process.kill()
        raise AssertionError(f"{module} on {num_ranks} ranks hung for {timeout_s} s:\n{said}") from None
    return process.returncode, said
