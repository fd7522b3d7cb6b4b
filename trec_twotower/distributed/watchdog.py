"""The phase of each rank: published every second, and reported when a rank does not answer."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, Self

import torch.distributed as dist

from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError, LostRanks

BEAT_S = 1.0
ANSWER_S = 5.0  # for the store, which may have gone with the rank that held it
MISTAKES = (ConfigError, DataError)
MISTAKE = "mistake"  # its place in the store
LOST = ("gloo", "NCCL", "Application timeout", "Connection", "Broken pipe")


class Heartbeat:
    """While entered, the other ranks know the phase of this one; a collective that fails becomes a LostRanks.

    A collective fails when a rank has died, or has not come to it within train.timeout_s. Where that rank had found a
    mistake of a person's (in rows that it alone reads, say), the others end with the same error.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.doing = "its start"
        self._is_over = threading.Event()
        self._is_store_gone = threading.Event()
        self._beats: threading.Thread | None = None
        self._mistake: Exception | None = None

    def set_phase(self, phase: str) -> None:
        """Report what this rank is doing from now on, such as "step 12"."""
        self.doing = phase

    def __enter__(self) -> Self:
        if self.ranks.num_ranks > 1 and self.ranks.store is not None:
            self._beats = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._beats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None or self.ranks.num_ranks == 1:
                return
            if isinstance(error, MISTAKES) and self.ranks.store is not None:
                self._tell(error)
            elif is_lost(error):
                others = self._others()
                if self._mistake is not None:
                    raise self._mistake from error
                raise LostRanks(
                    f"Rank {self.ranks.rank} lost the others at {self.doing} ({cause_of(error)}). {others} "
                    "The same command resumes from the newest checkpoint; if the other ranks are only slow, raise "
                    "train.timeout_s."
                ) from error
        finally:
            self._is_over.set()

    def _store(self) -> dist.Store:
        assert self.ranks.store is not None
        store = self.ranks.store.clone()  # a connection of its own: nobody waits for another's answer
        store.set_timeout(timedelta(seconds=ANSWER_S))
        return store

    def _tell(self, mistake: Exception) -> None:
        with suppress(dist.DistError):
            self._store().set(MISTAKE, json.dumps([type(mistake).__name__, str(mistake)]))

    def _beat(self) -> None:
        try:
            store = self._store()
            while True:
                store.set(f"beat_{self.ranks.rank}", json.dumps([time.time(), self.doing]))
                if self._is_over.wait(BEAT_S):
                    return
        except dist.DistError:
            self._is_store_gone.set()  # the next collective fails and reports it

    def _others(self) -> str:
        """Return the known state of the other ranks as text; `_mistake` is set to the error that one of them found."""
        said: list[str] = []
        asking = threading.Thread(target=self._ask, args=(said,), daemon=True)
        asking.start()
        until = time.monotonic() + ANSWER_S + 1
        while asking.is_alive() and time.monotonic() < until and not self._is_store_gone.is_set():
            asking.join(0.1)
        how = "is gone" if self._is_store_gone.is_set() else "does not answer"
        return " ".join(said) or f"Rank 0, which keeps the ranks' addresses, {how}."

    def _ask(self, said: list[str]) -> None:
        try:
            store = self._store()
            if store.check([MISTAKE]):
                name, message = json.loads(store.get(MISTAKE))
                self._mistake = next(kind for kind in MISTAKES if kind.__name__ == name)(message)
            for rank in range(self.ranks.num_ranks):
                if rank != self.ranks.rank and (line := self._about(store, rank)):
                    said.append(line)
        except dist.DistError:
            said.append("Rank 0, which keeps the ranks' addresses, is gone.")

    def _about(self, store: dist.Store, rank: int) -> str:
        if not store.check([f"beat_{rank}"]):
            return f"Rank {rank} was never heard of."
        beat: list[Any] = json.loads(store.get(f"beat_{rank}"))
        silent_s = time.time() - beat[0]
        return f"Rank {rank} was last heard of {silent_s:,.0f} s ago at {beat[1]}."


def is_lost(error: BaseException) -> bool:
    """Return whether the error reports that another rank did not answer."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in LOST)


def cause_of(error: BaseException) -> str:
    """Return the first part of torch's error, without its advice and source location."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.partition(". This is typically caused")[0]
    return line.rpartition("] ")[2][:160] if line.startswith("[") else line[:160]
