"""File locks: one process at a time works on a folder, and errors in the others name that process."""

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
HOLDER_BYTES = 256
BEAT_S = 2.0
PATIENCE_S = 5.0  # for a holder that is about to end, and for the next heartbeat of one on another host


class FolderLock:
    """A lock that is held from `acquire` to `release`, or until the process dies.

    The kernel frees it (flock) when its holder dies, also on other hosts where the file system supports that. Where it
    does not, a lock whose holder is on another host counts as held as long as its heartbeat changes.
    """

    def __init__(self, path: Path, state: str, advice: str) -> None:
        """`state` and `advice` complete the error of another process: FOLDER is STATE by process N: ADVICE."""
        self.path = path
        self.state, self.advice = state, advice
        self._lock = FileLock(path, thread_local=False)
        self._file: tuple[int, int] | None = None  # device and inode of the lock that is held
        self._holder_file: int | None = None
        self._made_folder = False
        self._is_over = threading.Event()
        self._beats: threading.Thread | None = None

    def acquire(self, patience_s: float = PATIENCE_S) -> None:
        """Wait up to `patience_s` for the holder to end; raises ConfigError naming it."""
        self._made_folder = not self.path.parent.is_dir()
        self._make_folder()
        try:
            self._lock.acquire(timeout=patience_s)  # which makes a folder again that a last holder has just removed
        except Timeout:
            raise self._refusal() from None
        before = self._holder()
        if before.get("host") not in (None, socket.gethostname()) and self._changes(before, patience_s):
            self._lock.release()
            raise self._refusal()
        found = self.path.stat()
        self._file = found.st_dev, found.st_ino
        self._holder_file = os.open(self._holder_path, os.O_RDWR | os.O_CREAT, 0o644)
        self._is_over.clear()
        self._beat()
        self._beats = threading.Thread(target=self._keep_beating, name="lock heartbeat", daemon=True)
        self._beats.start()

    @property
    def is_in_place(self) -> bool:
        """Whether the lock that is held still has its name: False once its folder was moved, removed or replaced."""
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self._file == (found.st_dev, found.st_ino)

    def release(self) -> None:
        """Free the lock and remove its files, and the folder if it was made for the lock and is empty."""
        if self._file is None:
            return
        self._is_over.set()
        if self._beats is not None:
            self._beats.join()
        assert self._holder_file is not None
        os.close(self._holder_file)
        if self.is_in_place:  # else these are the files of another run
            self._holder_path.unlink(missing_ok=True)
            self.path.unlink()
        self._lock.release()
        self._file = None
        if self._made_folder:
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
            found = json.loads(self._holder_path.read_bytes()[:4096])
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _changes(self, before: dict[str, Any], patience_s: float) -> bool:
        """Whether the heartbeat of a holder on another host changes; its clock is not compared with ours."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            time.sleep(min(0.1, patience_s))
            if self._holder().get("heartbeat") != before.get("heartbeat"):
                return True
        return False

    def _refusal(self) -> ConfigError:
        holder = self._holder()
        since = holder.get("heartbeat")
        heard = f", last heard of {time.time() - since:,.0f} s ago" if isinstance(since, int | float) else ""
        return ConfigError(
            f"{self.state} by process {holder.get('pid', '?')} on {holder.get('host', '?')}{heard}: {self.advice}"
        )

    def _keep_beating(self) -> None:
        while not self._is_over.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        assert self._holder_file is not None
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()})
        with naming(self._holder_path):
            os.pwrite(self._holder_file, content.encode().ljust(HOLDER_BYTES), 0)  # one write: nobody reads half of it
            os.ftruncate(self._holder_file, HOLDER_BYTES)


class RunLock(FolderLock):
    """The lock of a run directory that is being trained."""

    def __init__(self, run_dir: Path) -> None:
        advice = "wait for it or end it, or train into another run_dir."
        super().__init__(run_dir / LOCK, f"{run_dir} is being trained", advice)

    def check(self) -> None:
        """Raise TrainingError where the run directory was moved, removed or replaced while this lock was held."""
        if not self.is_in_place:
            raise TrainingError(
                f"{self.path.parent} was moved, removed or replaced while it was trained, so this training ends. The "
                "folder that it began in has its checkpoints: move it back, or continue with run_dir=ITS_NEW_PLACE."
            )
