"""Ranks are started as asked, and the launcher ends as they did."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launch/torchrun.sh"
SHOW = '#!/bin/sh\necho ARGS "$@"\nenv\n'  # stands in for Python: shows what it was called with

JOB = """
import os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
if what == "show":
    sys.stdout.write(" ".join(["rank", str(rank), "of", os.environ["WORLD_SIZE"], *sys.argv[2:]]) + "\\n")
    sys.stdout.flush()
elif what == "exit" and rank == 1:
    print("table 'brand' is missing", file=sys.stderr, flush=True)
    sys.exit(3)
elif what == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "restart" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(1)
elif what == "restart":
    sys.stdout.write(f"attempt 1 at port {os.environ['MASTER_PORT']}\\n")  # one write: lines do not mix
    sys.stdout.flush()
else:
    sys.stdout.write("started\\n")
    sys.stdout.flush()
    time.sleep(60)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Starts launch/torchrun.sh in a folder whose `trec_twotower` is the launcher module and JOB alone."""
    package = tmp_path / "trec_twotower"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(JOB)
    shutil.copy(ROOT / "trec_twotower/distributed/launcher.py", package)
    for name in list(os.environ):
        if name in ("MASTER_ADDR", "MASTER_PORT") or name.startswith(("NNODES", "NODE_", "NPROC", "RDZV", "MAX_R")):
            monkeypatch.delenv(name)

    def start(*args: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [LAUNCHER, *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def shown(launch, tmp_path):
    """The arguments and the environment that torchrun would be started with, without starting it."""
    show = tmp_path / "show"
    show.write_text(SHOW)
    show.chmod(0o755)

    def start(*args: str, **environ: str) -> tuple[list[str], dict[str, str]]:
        out, err = launch(*args, **{"CUDA_VISIBLE_DEVICES": "", **environ, "PYTHON": str(show)}).communicate(timeout=30)
        lines = out.splitlines()
        assert lines, err
        return lines[0].split()[1:], dict(line.split("=", 1) for line in lines[1:] if "=" in line)

    return start


@pytest.mark.timeout(60)
def test_each_rank_runs_the_command_with_its_arguments(launch):
    out, err = (job := launch("--ranks", "2", "show", "a=1", "--ranks")).communicate()
    assert sorted(out.splitlines()) == ["rank 0 of 2 a=1 --ranks", "rank 1 of 2 a=1 --ranks"]
    assert (job.returncode, err) == (0, "")


@pytest.mark.timeout(60)
def test_exit_code_is_that_of_the_rank_that_failed_and_its_words_stand_alone(launch):
    _, err = (job := launch("--ranks", "2", "exit")).communicate()
    assert job.returncode == 3
    assert err.splitlines() == [
        "table 'brand' is missing",
        "torchrun: rank 1 ended with exit code 3; see its message above.",
    ]


@pytest.mark.timeout(60)
def test_a_killed_rank_is_named_with_its_signal(launch):
    _, err = (job := launch("--ranks=2", "kill")).communicate()
    assert job.returncode == 128 + 9
    assert "rank 1" in err and "was killed by SIGKILL" in err
    assert "Traceback" not in err


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_ends_its_ranks_and_says_one_line(launch, stop):
    job = launch("--ranks", "2", "wait")
    assert [job.stdout.readline(), job.stdout.readline()] == ["started\n"] * 2
    job.send_signal(stop)
    _, err = job.communicate()  # ends only when the ranks, which hold the pipe, have ended too
    assert job.returncode == 128 + stop
    assert [line for line in err.splitlines() if line.startswith("torchrun:")] == [f"torchrun: stopped by {stop.name}."]


@pytest.mark.timeout(60)
def test_ranks_start_again_at_another_port(launch):
    out, err = (job := launch("--ranks", "2", "restart", MAX_RESTARTS="1")).communicate()
    assert job.returncode == 0, err
    ports = {line.split()[-1] for line in out.splitlines()}
    assert out.count("attempt 1 at port") == 2
    assert len(ports) == 1


@pytest.mark.timeout(90)
def test_two_machines_become_one_job(launch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [
        launch(
            "show",
            NNODES="2",
            NODE_RANK=str(node),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            NPROC_PER_NODE="1",
        )
        for node in (0, 1)
    ]
    said = [node.communicate() for node in nodes]
    assert [out for out, _ in said] == ["rank 0 of 2\n", "rank 1 of 2\n"], said
    assert [node.returncode for node in nodes] == [0, 0]


@pytest.mark.parametrize(
    ("args", "environ", "ranks"),
    [
        ((), {}, "1"),
        ((), {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "3"),
        ((), {"CUDA_VISIBLE_DEVICES": "-1"}, "1"),
        ((), {"NPROC_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, "4"),
        (("--ranks", "5"), {"NPROC_PER_NODE": "4"}, "5"),
    ],
)
def test_number_of_ranks(shown, args, environ, ranks):
    arguments, _ = shown(*args, "train", **environ)
    assert f"--nproc-per-node={ranks}" in arguments
    assert arguments[-3:] == ["-m", "trec_twotower", "train"]


def test_gpus_are_counted_where_the_driver_lists_them(shown, tmp_path, monkeypatch):
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-b)'\n")
    smi.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    show = str(tmp_path / "show")
    out = subprocess.run(
        [LAUNCHER, "train"],
        env={"PATH": f"{smi.parent}:{os.environ['PATH']}", "PYTHON": show},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--nproc-per-node=2" in out.splitlines()[0]


def test_one_machine_takes_a_free_port_unless_told_one(shown):
    assert "--standalone" in shown("train")[0]
    arguments, _ = shown("train", MASTER_PORT="23456")
    assert "--rdzv-endpoint=localhost:23456" in arguments and "--standalone" not in arguments


def test_elastic_job_meets_at_its_endpoint(shown):
    arguments, _ = shown("train", NNODES="2:4", RDZV_ENDPOINT="node-a:29400", RDZV_ID="job7", MAX_RESTARTS="3")
    assert set(arguments) >= {
        "--nnodes=2:4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node-a:29400",
        "--rdzv-id=job7",
        "--max-restarts=3",
    }


def test_environment_is_completed_but_not_overruled(shown, monkeypatch):
    for name in ("GLIBC_TUNABLES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    _, environ = shown("train")
    assert environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    cores = len(os.sched_getaffinity(0))
    assert environ["OMP_NUM_THREADS"] == str(cores)  # one rank without a GPU
    assert "glibc.malloc.trim_threshold=17179869184" in environ["GLIBC_TUNABLES"]
    assert shown("--ranks", str(2 * cores), "train")[1]["OMP_NUM_THREADS"] == "1"
    assert shown("train", CUDA_VISIBLE_DEVICES="0")[1]["OMP_NUM_THREADS"] == "1"
    _, environ = shown("train", OMP_NUM_THREADS="8", GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert (environ["OMP_NUM_THREADS"], environ["GLIBC_TUNABLES"]) == ("8", "glibc.malloc.arena_max=2")
    _, environ = shown("train", GLIBC_TUNABLES="glibc.cpu.x86_ibt=off")
    assert environ["GLIBC_TUNABLES"].startswith("glibc.cpu.x86_ibt=off:glibc.malloc.")


@pytest.mark.parametrize(
    ("args", "environ", "complaint"),
    [
        ((), {}, "launch/torchrun.sh [--ranks N] COMMAND"),
        (("--ranks",), {}, "launch/torchrun.sh [--ranks N] COMMAND"),
        (("--ranks", "two", "train"), {}, "--ranks is 'two'"),
        (("--ranks", "0", "train"), {}, "--ranks is '0'"),
        (("train",), {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        (("train",), {"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is not set: 0 to 1"),
        (("train",), {"NNODES": "2:4"}, "set RDZV_ENDPOINT=HOST:PORT"),
        (
            ("train",),
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MAX_RESTARTS": "1"},
            "set RDZV_ENDPOINT",
        ),
    ],
)
def test_what_cannot_start_is_refused_at_once(launch, args, environ, complaint):
    out, err = (job := launch(*args, PYTHON="false", **environ)).communicate(timeout=30)
    assert (job.returncode, out) == (2, "")
    assert complaint in err


@pytest.mark.timeout(60)
def test_machines_that_do_not_meet_are_one_line(launch, tmp_path):
    """The second of two machines, whose first never answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start_s = time.monotonic()
    where = f"--nnodes=2 --node-rank=1 --master-addr=127.0.0.1 --master-port={port} --rdzv-conf=timeout=2"
    job = subprocess.run(
        [sys.executable, "-m", "trec_twotower.distributed.launcher", *where.split(), "-m", "trec_twotower", "show"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert job.returncode == 1
    assert "torchrun: the machines of this job did not find each other" in job.stderr
    assert "Traceback" not in job.stderr
    assert time.monotonic() - start_s < 30


@pytest.mark.timeout(60)
def test_ctrl_c_inside_exec_while_torch_is_imported_ends_with_130(tmp_path):
    """Python then sends itself SIGINT at exit, although the KeyboardInterrupt was caught."""
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text('exec("raise KeyboardInterrupt")')
    job = subprocess.run(
        [sys.executable, "-m", "trec_twotower.distributed.launcher", "-m", "trec_twotower", "show"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (job.returncode, job.stderr) == (130, "torchrun: stopped by SIGINT.\n")
