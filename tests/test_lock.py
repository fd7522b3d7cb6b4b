"""One trainer a run folder: the kernel says whether the holder lives, a heartbeat says it to other hosts."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from trec_twotower import lock as locks
from trec_twotower.errors import ConfigError
from trec_twotower.lock import LOCK, RunLock

HOLDER = """
import sys, pathlib
from trec_twotower.lock import RunLock
RunLock(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.mark.timeout(60)
def test_a_second_trainer_is_told_who_holds_the_folder(holder, tmp_path):
    with pytest.raises(ConfigError) as raised:
        RunLock(tmp_path / "run").acquire(patience_s=0)
    for said in (str(tmp_path / "run"), f"process {holder.pid} on {socket.gethostname()}", "last heard of 0 s ago"):
        assert said in str(raised.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_dead_holder_left_is_taken_over_at_once(number, holder, tmp_path):
    holder.send_signal(number)
    holder.wait()
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == holder.pid
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0)
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.timeout(60)
def test_a_stopped_holder_keeps_the_lock(holder, tmp_path):
    """It may go on: only its death frees the folder."""
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match=f"process {holder.pid} "):
        RunLock(tmp_path / "run").acquire(patience_s=0)


@pytest.mark.timeout(60)
def test_a_trainer_waits_for_one_that_is_just_ending(holder, tmp_path):
    taken = threading.Event()
    lock = RunLock(tmp_path / "run")

    def wait() -> None:
        lock.acquire(patience_s=50)
        taken.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not taken.wait(0.3)
    holder.kill()
    assert taken.wait(40)
    waiting.join()
    lock.release()


def test_a_released_folder_is_free_and_gone_where_nothing_came_into_it(tmp_path):
    for _ in range(2):
        lock = RunLock(tmp_path / "a" / "run")
        lock.acquire(patience_s=0)
        lock.release()
        assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "a" / "run").mkdir()
    lock.acquire(patience_s=0)
    lock.release()
    assert list((tmp_path / "a" / "run").iterdir()) == []


@pytest.fixture
def from_elsewhere(tmp_path):
    """The lock of a holder on another host, whose flock does not reach this one; `beat` is a sign of life of it."""
    (tmp_path / "run").mkdir()

    def beat(number: float) -> None:
        (tmp_path / "run" / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "heartbeat": number}))

    beat(1.0)
    return beat


@pytest.mark.timeout(60)
def test_a_holder_on_another_host_is_left_alone_while_its_heart_beats(from_elsewhere, tmp_path, monkeypatch):
    sleep = time.sleep

    def beating(seconds: float) -> None:
        sleep(seconds)
        from_elsewhere(time.monotonic())

    monkeypatch.setattr(locks.time, "sleep", beating)
    with pytest.raises(ConfigError, match="process 7 on elsewhere"):
        RunLock(tmp_path / "run").acquire(patience_s=30)


@pytest.mark.timeout(60)
def test_the_lock_of_another_host_is_taken_over_when_its_heart_has_stopped(from_elsewhere, tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0.5)
    assert json.loads((tmp_path / "run" / LOCK).read_text())["host"] == socket.gethostname()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00"])
def test_a_lock_without_sense_hinders_nobody(content, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_bytes(content)
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0)
    lock.release()


@pytest.mark.timeout(60)
def test_the_heart_of_a_holder_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0)
    path = tmp_path / "run" / LOCK
    first = json.loads(path.read_text())["heartbeat"]
    while json.loads(path.read_text())["heartbeat"] == first:
        time.sleep(0.005)
    lock.release()


def test_a_file_that_was_removed_under_a_waiter_guards_nothing(tmp_path, monkeypatch):
    """Between opening it and locking it, its last holder released it: the waiter takes the new file."""
    lock = RunLock(tmp_path / "run")
    flock, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not calls:
            (tmp_path / "run" / LOCK).unlink()
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock.acquire(patience_s=10)
    assert len(calls) == 2
    assert os.stat(tmp_path / "run" / LOCK).st_ino == os.fstat(calls[-1]).st_ino
    lock.release()
