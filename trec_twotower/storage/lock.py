"""File locks: one process at a time works in a folder; the error in other processes names it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trec_twotower.errors import ConfigError, TrainingError
from trec_twotower.storage.atomic import naming

LOCK = ".lock"
HOLDER = ".holder"  # appended to the name of a lock: JSON of host, pid and heartbeat
LOCK_FILES = (LOCK, LOCK + HOLDER)
HOLDER_BYTES = 256  # size of the holder file
BEAT_S = 2.0  # seconds between heartbeats
PATIENCE_S = 5.0  # seconds to wait for a holder that is ending, or for the heartbeat of one on another host


class FolderLock:
    """A lock that is held from `acquire` to `release`, or until the process dies.

    The kernel frees the lock (flock) when its holder dies, on other hosts only if the file system supports that.
    Otherwise a lock with a holder on another host counts as held as long as its heartbeat changes.
    """

    def __init__(self, path: Path, state: str, advice: str) -> None:
        """`state` and `advice` complete the error of another process: FOLDER is STATE by process N: ADVICE."""
        self.path = path
        self.state, self.advice = state, advice
        self._lock = FileLock(path, thread_local=False)
        self._file: tuple[int, int] | None = None  # device and inode of the held lock
        self._holder_file: int | None = None
        self._has_created_folder = False
        self._stop_event = threading.Event()
        self._beat_thread: threading.Thread | None = None

    def acquire(self, patience_s: float = PATIENCE_S) -> None:
        """Wait up to `patience_s` for the holder to end; raises ConfigError naming it."""
        self._has_created_folder = not self.path.parent.is_dir()
        self._make_folder()
        try:
            self._lock.acquire(timeout=patience_s)  # creates the folder again if the last holder has just removed it
        except Timeout:
            raise self._refusal() from None
        before = self._holder()
        if before.get("host") not in (None, socket.gethostname()) and self._changes(before, patience_s):
            self._lock.release()
            raise self._refusal()
        status = self.path.stat()
        self._file = status.st_dev, status.st_ino
        self._holder_file = os.open(self._holder_path, os.O_RDWR | os.O_CREAT, 0o644)
        self._stop_event.clear()
        self._beat()
        self._beat_thread = threading.Thread(target=self._keep_beating, name="lock heartbeat", daemon=True)
        self._beat_thread.start()

    @property
    def is_in_place(self) -> bool:
        """Return whether the held lock still has its name: False once its folder was moved, removed or replaced."""
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self._file == (status.st_dev, status.st_ino)

    def release(self) -> None:
        """Free the lock and remove its files, and the folder if `acquire` created it and it is empty."""
        if self._file is None:
            return
        self._stop_event.set()
        if self._beat_thread is not None:
            self._beat_thread.join()
        assert self._holder_file is not None
        os.close(self._holder_file)
        if self.is_in_place:  # otherwise these are the files of another process
            self._holder_path.unlink(missing_ok=True)
            self.path.unlink()
        self._lock.release()
        self._file = None
        if self._has_created_folder:
            with suppress(OSError):  # it is not empty, or was moved
                self.path.parent.rmdir()

    @property
    def _holder_path(self) -> Path:
        return self.path.with_name(self.path.name + HOLDER)

    def _make_folder(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(
                f"{self.path.parent} is not a folder, or its parent is a file: choose another run_dir."
            ) from None

    def _holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(self._holder_path.read_bytes()[:4096])
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _changes(self, before: dict[str, Any], patience_s: float) -> bool:
        """Return whether the heartbeat of a holder on another host changes, whatever its clock shows."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            time.sleep(min(0.1, patience_s))
            if self._holder().get("heartbeat") != before.get("heartbeat"):
                return True
        return False

    def _refusal(self) -> ConfigError:
        holder = self._holder()
        heartbeat = holder.get("heartbeat")
        age = f", last heard of {time.time() - heartbeat:,.0f} s ago" if isinstance(heartbeat, int | float) else ""
        return ConfigError(
            f"{self.state} by process {holder.get('pid', '?')} on {holder.get('host', '?')}{age}: {self.advice}"
        )

    def _keep_beating(self) -> None:
        while not self._stop_event.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        assert self._holder_file is not None
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()})
        with naming(self._holder_path):
            os.pwrite(self._holder_file, content.encode().ljust(HOLDER_BYTES), 0)  # in one write: no partial reads
            os.ftruncate(self._holder_file, HOLDER_BYTES)


class RunLock(FolderLock):
    """The lock of a run directory that is being trained."""

    def __init__(self, run_dir: Path) -> None:
        advice = "wait for it or end it, or train into another run_dir."
        super().__init__(run_dir / LOCK, f"{run_dir} is being trained", advice)

    def check(self) -> None:
        """Raise TrainingError if the run directory was moved, removed or replaced while this lock was held."""
        if not self.is_in_place:
            raise TrainingError(
                f"{self.path.parent} was moved, removed or replaced while it was trained, so this training ends. Its "
                "checkpoints are in the original folder: move it back, or continue with run_dir=ITS_NEW_PLACE."
            )
