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
from pathlib import Path
from typing import Any

import pytest

from trec_twotower.errors import ConfigError
from trec_twotower.storage import lock as locks
from trec_twotower.storage.lock import HOLDER, LOCK, LOCK_FILES, FolderLock, RunLock

HOLDING = """
import sys, pathlib
from trec_twotower.storage.lock import RunLock
RunLock(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def held_by(run_dir: Path) -> dict[str, Any]:
    """What the lock of a run directory says of its holder."""
    return json.loads((run_dir / (LOCK + HOLDER)).read_text())


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "run")],
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
    assert held_by(tmp_path / "run")["pid"] == holder.pid
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0)
    assert held_by(tmp_path / "run")["pid"] == os.getpid()
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
        content = json.dumps({"host": "elsewhere", "pid": 7, "heartbeat": number})
        (tmp_path / "run" / (LOCK + HOLDER)).write_text(content)

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
    monkeypatch.undo()  # its heart stops, and who was refused holds nothing
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0.5)
    lock.release()


@pytest.mark.timeout(60)
def test_the_lock_of_another_host_is_taken_over_when_its_heart_has_stopped(from_elsewhere, tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0.5)
    assert held_by(tmp_path / "run")["host"] == socket.gethostname()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00"])
def test_a_lock_without_sense_hinders_nobody(content, tmp_path):
    (tmp_path / "run").mkdir()
    for name in LOCK_FILES:
        (tmp_path / "run" / name).write_bytes(content)
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0)
    assert held_by(tmp_path / "run")["pid"] == os.getpid()
    lock.release()


@pytest.mark.timeout(60)
def test_the_heart_of_a_holder_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    lock = RunLock(tmp_path / "run")
    lock.acquire(patience_s=0)
    first = held_by(tmp_path / "run")["heartbeat"]
    while held_by(tmp_path / "run")["heartbeat"] == first:
        time.sleep(0.005)
    lock.release()


def test_a_file_that_was_removed_under_a_waiter_guards_nothing(tmp_path, monkeypatch):
    """Its last holder released it after the waiter had opened it: the waiter takes the new file."""
    lock, path = RunLock(tmp_path / "run"), tmp_path / "run" / LOCK
    flock, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock.acquire(patience_s=10)
    assert len(calls) > 1
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        RunLock(tmp_path / "run").acquire(patience_s=0)
    lock.release()


def test_the_file_is_gone_before_the_lock_is_free(tmp_path, monkeypatch):
    """Whoever gets the lock in between would lose the file, and a third would make another: two would train."""
    lock, path = RunLock(tmp_path / "run"), tmp_path / "run" / LOCK
    lock.acquire(patience_s=0)
    flock, freed = fcntl.flock, []

    def freeing(file: int, how: int) -> None:
        freed.append((how, path.exists()))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", freeing)
    lock.release()
    assert freed == [(fcntl.LOCK_UN, False)]


@pytest.mark.timeout(60)
def test_a_release_waits_for_the_beat_under_way(tmp_path, monkeypatch):
    """It would go into whatever file is opened next, under the number that is free by then."""
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    lock, path, write = RunLock(tmp_path / "run"), tmp_path / "run" / LOCK, os.pwrite
    lock.acquire(patience_s=0)
    under_way, go_on = threading.Event(), threading.Event()

    def slowly(*arguments) -> int:
        under_way.set()
        assert go_on.wait(30)
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", slowly)
    assert under_way.wait(30)
    releasing = threading.Thread(target=lock.release)
    releasing.start()
    releasing.join(0.2)
    assert releasing.is_alive() and path.exists()
    go_on.set()
    releasing.join()
    assert not path.exists()


def test_of_a_longer_lock_that_a_dead_holder_left_nothing_stays(tmp_path):
    """The new one is written over it."""
    path = tmp_path / "run" / (LOCK + HOLDER)
    path.parent.mkdir()
    left = {"host": socket.gethostname(), "pid": 10**9, "heartbeat": 1.0, "more": "x" * 100}
    path.write_text(json.dumps(left))
    lock = RunLock(path.parent)
    lock.acquire(patience_s=0)
    found = json.loads(path.read_text())
    assert found.keys() == {"host", "pid", "heartbeat"} and found["pid"] == os.getpid()
    lock.release()


@pytest.mark.timeout(60)
def test_a_folder_that_goes_with_its_last_holder_is_made_again(tmp_path, monkeypatch):
    """Between making sure of the folder and opening the file in it."""
    lock, make = RunLock(tmp_path / "run"), FolderLock._make_folder

    def late(made: FolderLock) -> None:
        make(made)
        (tmp_path / "run").rmdir()

    monkeypatch.setattr(FolderLock, "_make_folder", late)
    lock.acquire(patience_s=10)
    assert held_by(tmp_path / "run")["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_run_folder_that_is_a_file_or_lies_in_one_is_named(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{place} is not a folder, or its parent is a file: choose another run_dir"):
        RunLock(tmp_path / place).acquire(patience_s=0)


def test_a_lock_whose_folder_was_moved_is_out_of_place_and_leaves_the_new_one_alone(tmp_path):
    """Another trainer has the old path by then: its lock must outlive the release of the first."""
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    first.acquire(patience_s=0)
    assert first.is_in_place
    (tmp_path / "run").rename(tmp_path / "moved")
    assert not first.is_in_place
    second.acquire(patience_s=0)
    assert second.is_in_place and not first.is_in_place
    first.release()
    assert second.is_in_place
    with pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        RunLock(tmp_path / "run").acquire(patience_s=0)
    second.release()


@pytest.mark.timeout(60)
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no list of this process's files")
def test_who_waits_in_vain_leaves_no_file_open(holder, tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=f"process {holder.pid} "):
        RunLock(tmp_path / "run").acquire(patience_s=0.3)
    assert set(os.listdir("/proc/self/fd")) == before
