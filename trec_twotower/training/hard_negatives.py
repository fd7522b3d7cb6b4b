"""Hard negatives that are mined again as the model changes: neighbours of the items, by vectors of the live towers.

The neighbours of a step are written to RUN/neighbours/step-NNNNNNNN before any batch uses them, so that a run that is
resumed from a later checkpoint continues with the same lists.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.model.encode import encode_everywhere
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.ops.hashing import uniform
from trec_twotower.ops.ragged import Ragged, offsets_of
from trec_twotower.storage.artifacts import new_folder, open_sealed
from trec_twotower.storage.manifest import MANIFEST, seal
from trec_twotower.training.run_dir import Run

NEIGHBOURS = "neighbours"
MAX_ITEMS = 1 << 17  # items whose neighbours are mined: the most popular ones
KEPT = 64  # neighbours per item, sampled from the range of ranks
MEND = "bring it back, or train into another run_dir."
_RANKS = 0x72616E  # separates this random stream from others of the same seed

# (items' vectors, rows, first, last) -> (rows, last - first + 1): see index/neighbours.py
Neighbours = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


class HardNegatives:
    """The neighbours of the positives as mined last; all ranks call together."""

    def __init__(
        self,
        run: Run,
        ranks: Ranks,
        model: TwoTower,
        search: Neighbours | None,
        step: int,
        print_line: Callable[[str], None],
    ) -> None:
        """Remove neighbors mined after `step`, at which the run resumes; they will be mined again."""
        config = run.config.loss.negatives.refresh
        assert config is not None
        if search is None:
            raise ConfigError(
                "loss.negatives.refresh needs a search for neighbours: give train() that of the index package "
                "(trec_twotower.index.item_neighbors), as the command line does."
            )
        self.config, self.run, self.ranks = config, run, ranks
        self.model, self.search, self.print_line = model, search, print_line
        self._current: tuple[int, Ragged, np.ndarray] | None = None  # step, lists, and the items that they are of

        def remove_later() -> None:
            for path in self._path(step).parent.glob("step-*"):
                if path.name > self._path(step).name:
                    shutil.rmtree(path, ignore_errors=True)

        ranks.once(remove_later)

    def at(self, step: int, sources: FeatureDataset, count_I: np.ndarray) -> tuple[Ragged, np.ndarray] | None:
        """Return the lists for the batches from a step on, and the list of each item (-1: none).

        None before the first refresh. Raises DataError where the lists of an earlier step are gone.
        """
        found_at = step - step % self.config.every
        if not found_at:
            return None
        if self._current is None or self._current[0] != found_at:
            path = self._path(found_at)
            is_there = self.ranks.once((path / MANIFEST).is_file)
            if not is_there and step == found_at:
                self._mine(found_at, sources, count_I)
            self._current = found_at, *self.ranks.together(lambda: _read(path))
        _, lists, items = self._current
        list_of_item = np.full(len(sources.catalogue), -1, np.int64)
        list_of_item[items] = np.arange(len(items))
        return lists, list_of_item

    def _mine(self, step: int, sources: FeatureDataset, count_I: np.ndarray) -> None:
        began = time.perf_counter()
        low, high = self.config.neighbor_range
        item_ID = encode_everywhere(self.model, "item", sources.catalogue.columns, self.ranks).float().cpu().numpy()
        items = np.argsort(-count_I, kind="stable")[: min(MAX_ITEMS, int((count_I > 0).sum()))]
        mine = items[self.ranks.share(len(items))]
        sampled = np.argsort(uniform(_RANKS, self.run.config.data.seed, step, np.arange(high - low + 1)))[:KEPT]
        near_BK = self.ranks.together(lambda: self.search(item_ID, mine, low, high))
        near_BK = np.ascontiguousarray(near_BK[:, np.sort(sampled)])
        sizes = self.ranks.sizes(len(mine))
        everyone = self.ranks.gather(torch.from_numpy(near_BK).to(self.ranks.device), sizes).cpu().numpy()
        self.ranks.once(lambda: self._write(step, items, everyone))
        self.print_line(
            f"step {step:>6,}  neighbours {low:,} to {high:,} of {len(items):,} items, {everyone.shape[1]} of each, in "
            f"{time.perf_counter() - began:.1f} s"
        )

    def _write(self, step: int, items: np.ndarray, near_BK: np.ndarray) -> None:
        with new_folder(self._path(step)) as folder:
            np.save(folder / "items.npy", items)
            np.save(folder / "neighbours.npy", near_BK.astype(np.int32))
            seal(folder, {"step": step})
        # Keep the older lists that a checkpoint may resume with; the newest checkpoint may still be being written.
        every = self.config.every
        checkpoints = self.run.folder.glob(f"checkpoints/step-*/{MANIFEST}")
        saved = [int(path.parent.name.removeprefix("step-")) for path in checkpoints]
        kept = {self._path(each - each % every) for each in (*saved, step, step - 1)}
        for path in self._path(step).parent.glob("step-*"):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.run.folder / NEIGHBOURS / f"step-{step:08d}"


def _read(path: Path) -> tuple[Ragged, np.ndarray]:
    open_sealed(path, MEND)
    items, near_BK = np.load(path / "items.npy"), np.load(path / "neighbours.npy")
    is_item = near_BK >= 0
    return Ragged(offsets_of(is_item.sum(1)), near_BK[is_item]), items
