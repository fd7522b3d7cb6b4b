"""A built index: searched without seen items, saved, loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.data.lists import Lists
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.files import MANIFEST, new_folder, open_sealed, seal
from trec_twotower.index.engine import Device, Engine, as_vectors, faiss
from trec_twotower.metrics import blocks_by_length, first_kept

MEND = "build the index again: trec-twotower index RUN"


@dataclass(frozen=True)
class IndexReport:
    """How an index was built and what it reaches; saved in its manifest."""

    kind: str  # FAISS's name of the layout: IVF809,Flat
    device: str  # where it was tuned: cpu or gpu
    lists: int
    k: int  # neighbours the recall is of, at most the catalogue
    nprobe: int  # lists scanned for k neighbours
    nprobe_at: tuple[tuple[int, int], ...]  # (k, nprobe), rising: longer answers need more lists
    target_recall: float
    reached_recall: float  # on users the tuning did not see
    scanned_share: float  # of the catalogue, per user
    bytes: int
    build_s: float
    tune_s: float


class ItemIndex:
    """The catalogue's nearest-neighbour search; made by `build_index` or `ItemIndex.load`."""

    def __init__(
        self,
        engine: Engine,
        report: IndexReport,
        *,
        item_ids: pa.Array | None = None,
        similarity: str | None = None,
        model_version: str | None = None,
    ) -> None:
        self._engine = engine
        self.report = report
        self.item_ids = item_ids  # the outside id of each item row; known once loaded
        self.similarity = similarity
        self.model_version = model_version

    def __len__(self) -> int:
        """How many items."""
        return self._engine.num_items

    @property
    def dim(self) -> int:
        return self._engine.dim

    @property
    def device(self) -> str:
        return self._engine.device

    def search(self, user_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` items of highest score per user: scores float32 and item rows int64, best first."""
        return self.search_unseen(user_BD, k, Lists.empty(len(user_BD)))

    def search_unseen(self, user_BD: np.ndarray, k: int, seen: Lists) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, but an item on a user's `seen` list is never among that user's.

        A row is shorter than `k` (ending in -inf and -1) only when fewer unseen items exist: each
        search asks for k + seen items, with the nprobe that finds so many at the target recall,
        and rows still short probe more lists, all in the end.
        """
        user_BD = as_vectors(user_BD, "user")
        if user_BD.shape[1] != self.dim:
            raise ConfigError(
                f"The users' vectors have {user_BD.shape[1]} numbers but the items' of the index {self.dim}: "
                "both must come from the same model."
            )
        if not 1 <= k <= len(self):
            raise ConfigError(f"k is {k:,} but the catalogue has {len(self):,} items: ask for 1 to {len(self):,}.")
        if len(seen) != len(user_BD):
            raise ConfigError(f"{len(user_BD):,} users but {len(seen):,} lists of seen items: give one list each.")
        seen = seen.distinct()
        score_BK = np.full((len(user_BD), k), -np.inf, dtype=np.float32)
        item_row_BK = np.full((len(user_BD), k), -1, dtype=np.int64)
        for users in blocks_by_length(seen.lengths, extra=k):
            score_BK[users], item_row_BK[users] = self._search_block(user_BD[users], k, seen.take(users))
        return score_BK, item_row_BK

    def _search_block(self, user_BD: np.ndarray, k: int, seen: Lists) -> tuple[np.ndarray, np.ndarray]:
        is_in_catalogue = (seen.values >= 0) & (seen.values < len(self))
        num_seen_B = np.bincount(seen.rows[is_in_catalogue], minlength=len(seen))
        wanted_B = np.minimum(k, len(self) - num_seen_B)
        num_fetched = min(k + int(num_seen_B.max()), len(self))
        nprobe = self._nprobe_for(num_fetched)
        score_BK = np.full((len(user_BD), k), -np.inf, dtype=np.float32)
        item_row_BK = np.full((len(user_BD), k), -1, dtype=np.int64)
        short = np.arange(len(user_BD))
        while True:
            score_BC, item_row_BC = self._engine.search(user_BD[short], num_fetched, nprobe)
            is_unseen_BC = (item_row_BC >= 0) & ~seen.take(short).contain(item_row_BC)
            score_BK[short], item_row_BK[short] = first_kept(is_unseen_BC, k, (score_BC, -np.inf), (item_row_BC, -1))
            short = short[(item_row_BK[short] >= 0).sum(axis=1) < wanted_B[short]]
            if len(short) == 0:
                return score_BK, item_row_BK
            assert nprobe < self._engine.num_lists, "a search of all lists came back short"
            nprobe = min(2 * nprobe, self._engine.num_lists)

    def _nprobe_for(self, k: int) -> int:
        """Lists to scan for k neighbours: in proportion between two tuned k's, growing with k beyond them."""
        tuned_k, tuned_nprobe = zip(*self.report.nprobe_at, strict=True)
        nprobe = math.ceil(np.interp(k, tuned_k, tuned_nprobe) * max(1.0, k / tuned_k[-1]))
        return min(nprobe, self._engine.num_lists)

    def save(self, folder: Path, *, model_version: str, item_ids: pa.Array, similarity: str) -> None:
        """Write index.faiss, items.parquet and manifest.json; an older index stays until all is written.

        `item_ids` are the outside ids of the item rows, in order.
        """
        if len(item_ids) != len(self):
            raise DataError(f"{len(item_ids):,} item ids for an index of {len(self):,} items: give one per item row.")
        with new_folder(Path(folder)) as writing:
            faiss.write_index(self._engine.on_cpu, str(writing / "index.faiss"))
            items = pa.table({"item_row": np.arange(len(self), dtype=np.int64), "item_id": item_ids})
            pq.write_table(items, writing / "items.parquet", write_page_checksum=True)
            facts = {
                "model_version": model_version,
                "similarity": similarity,
                "metric": "inner_product",
                "dim": self.dim,
                "items": len(self),
                "report": asdict(self.report),
                "versions": {"faiss": faiss.__version__, "numpy": np.__version__, "pyarrow": pa.__version__},
            }
            seal(writing, facts)

    @classmethod
    def load(cls, folder: Path, *, model_version: str | None = None, device: Device = "auto") -> ItemIndex:
        """The index saved in `folder`, on the GPU where `device` and the machine allow, every byte verified.

        Raises ConfigError when it was built from another model than `model_version` (None: any),
        DataError for a missing or damaged file.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise DataError(f"There is no index in {folder}, its {MANIFEST} is missing: {MEND}")
        manifest = open_sealed(folder, MEND)
        if model_version is not None and manifest["model_version"] != model_version:
            raise ConfigError(
                f"The index in {folder} was built from model {manifest['model_version']}, "
                f"but the model is now {model_version}: export and index again (trec-twotower export RUN, then "
                "trec-twotower index RUN), or name the checkpoint it was built from (--checkpoint)."
            )
        on_cpu = faiss.read_index(str(folder / "index.faiss"))
        item_ids = pq.read_table(folder / "items.parquet", columns=["item_id"])["item_id"].combine_chunks()
        assert on_cpu.ntotal == len(item_ids) == manifest["items"], "verified files of differing lengths"
        assert on_cpu.metric_type == faiss.METRIC_INNER_PRODUCT, "a saved index of another metric"
        report = dict(manifest["report"])
        report["nprobe_at"] = tuple(map(tuple, report["nprobe_at"]))
        return cls(
            Engine(on_cpu, device),
            IndexReport(**report),
            item_ids=item_ids,
            similarity=manifest["similarity"],
            model_version=manifest["model_version"],
        )
