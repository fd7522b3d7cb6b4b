"""One trainer a run folder: a lock that the kernel frees when its holder dies, and a heartbeat for other hosts."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from trec_twotower.errors import ConfigError
from trec_twotower.files import naming

LOCK = ".lock"
BEAT_S = 2.0
PATIENCE_S = 5.0  # for a holder that is just ending, and for a foreign one's next heartbeat


class RunLock:
    """Held from `acquire` to `release`, or to the death of the process.

    On one host, and wherever the file system carries flock over hosts, the kernel says whether the holder lives: what a
    dead one left is taken over at once. A file system without it shows another host's heartbeat alone: such a lock is
    taken over when that does not change for PATIENCE_S.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK
        self._file: int | None = None
        self._made_folder = False
        self._is_over = threading.Event()
        self._beats: threading.Thread | None = None

    def acquire(self, patience_s: float = PATIENCE_S) -> None:
        """Raises ConfigError naming the holder when there is a live one, having waited for it to end."""
        self._made_folder = not self.path.parent.is_dir()
        until = time.monotonic() + patience_s
        while (file := self._try()) is None:
            if time.monotonic() >= until:
                raise self._refusal()
            time.sleep(0.1)
        self._file = file
        before = self._holder()
        if before and before.get("host") != socket.gethostname() and self._changes(before, patience_s):
            os.close(file)
            self._file = None
            raise self._refusal()
        self._beat()
        self._beats = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._beats.start()

    def release(self) -> None:
        """Give the folder free; it is taken away if it was made for the lock and nothing came into it."""
        if self._file is None:
            return
        self._is_over.set()
        if self._beats is not None:
            self._beats.join()
        self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        if self._made_folder and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def _try(self) -> int | None:
        """The locked file, or None where someone else holds it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(
                f"{self.path.parent} is no folder, or is to lie in a file: name another run_dir."
            ) from None
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its last holder has just removed the folder it had made
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it between the two lines above: then this lock guards nothing.
            if os.stat(self.path).st_ino == os.fstat(file).st_ino:
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(file)
        return None

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_bytes()[:4096])
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _changes(self, before: dict[str, Any], patience_s: float) -> bool:
        """Whether a foreign holder gives a sign of life; its clock is not compared with ours."""
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
            f"{self.path.parent} is being trained by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
            f"{heard}: wait for it or end it, or train into another run_dir."
        )

    def _keep_beating(self) -> None:
        while not self._is_over.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        assert self._file is not None
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()})
        with naming(self.path):
            os.pwrite(self._file, content.encode().ljust(256), 0)  # in place: a lock is on the file, not on its name
