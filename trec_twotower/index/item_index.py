"""A built index: searched without seen items, with filters, for several vectors per user; saved, loaded, mapped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index.backends.faiss_backend import (
    BLAS_BATCH,
    Answer,
    Device,
    error_text,
    faiss,
    without_prefetch_threads,
)
from trec_twotower.index.backends.kinds import make_searcher
from trec_twotower.index.backends.matrix import as_vectors
from trec_twotower.index.exact import empty_answer, merge_vectors, without_seen
from trec_twotower.index.filters import Allowed, Strategy, choose_strategy
from trec_twotower.index.searcher import SearchEffort, Searcher, effort_for
from trec_twotower.ops.ragged import Ragged
from trec_twotower.ops.topk import blocks_by_length
from trec_twotower.storage.artifacts import SealedFolder, new_folder
from trec_twotower.storage.manifest import MANIFEST, seal

MEND = "build the index again: trec-twotower index RUN"
ITEMS = "items.parquet"
HEAD_BYTES = 1 << 20  # of each index file, read and verified before it is mapped
BLOCK = 4096  # users that are searched for together
DEEPER = 2  # times the expected rank: filtered searches whose worst item ranks lower are repeated
WIDER = 4  # times the neighbours are searched for where an answer is short


@dataclass(frozen=True)
class IndexReport:
    """How an index was built and what it reaches; saved in its manifest."""

    kind: str  # FAISS's factory string: IVF404,SQfp16
    device: str  # where it was tuned: cpu or gpu
    lists: int  # 0: it has none
    shards: int
    k: int  # neighbours the recall is measured for, at most the number of items
    efforts: tuple[SearchEffort, ...]  # for k and its doubles
    refine_factor: int  # candidates that are scored again, as a multiple of k, where the kind does so
    target_recall: float
    reached_recall: float  # for users the tuning did not use, as all below
    scanned_share: float  # items scored per user / items
    scanned_most: float  # by the hundredth of users that scan most
    curve: tuple[tuple[float, float, float], ...]  # recall, scanned share and users/s of CPU time at several breadths
    bytes: int
    build_s: float  # exact search, training and adding
    add_s: float  # reading and adding the items
    tune_s: float
    settings: dict[str, Any] = field(default_factory=dict)  # the index section of the config it was built with
    exact_users_per_s: float = 0.0  # exact search, per second of CPU time
    latency_ms: dict[str, float] = field(default_factory=dict)  # p50, p90 and p99 of searches for one user each

    @property
    def users_per_s(self) -> float:
        """Return users per second of CPU time of the tuned search in one batch."""
        return min(self.curve, key=lambda point: abs(point[1] - self.scanned_share))[2]

    def summary(self) -> str:
        """Return a line with what was built and the recall that it reaches."""
        kind = f"{self.shards} x {self.kind}" if self.shards > 1 else self.kind
        lists = f"{self.efforts[0].breadth:,} of {self.lists:,} lists and " if self.lists else ""
        most = f" (at most {self.scanned_most:.1%} for 99 of 100 users)" if self.lists else ""
        return (
            f"{kind} on {self.device}; recall@{self.k} against exact search {self.reached_recall:.4f} "
            f"(target {self.target_recall}) on users not tuned for, scanning {lists}{self.scanned_share:.1%} of the "
            f"items{most}, {self.bytes / 1e6:.1f} MB, built in {self.build_s + self.tune_s:.1f} s"
        )

    @classmethod
    def read(cls, saved: dict[str, Any]) -> IndexReport:
        """Return the report of a manifest."""
        efforts = tuple(SearchEffort(**effort) for effort in saved["efforts"])
        return cls(**{**saved, "efforts": efforts, "curve": tuple(map(tuple, saved["curve"]))})


class ItemIndex:
    """The catalogue's nearest-neighbour search; made by `build_index` or `ItemIndex.load`."""

    def __init__(
        self,
        searcher: Searcher,
        report: IndexReport,
        *,
        sealed: SealedFolder | None = None,
    ) -> None:
        """`sealed` is the folder that it was loaded from, which has the items' ids."""
        self._searcher = searcher
        self.report = report
        self._sealed = sealed
        self._item_ids: pa.Array | None = None

    def __len__(self) -> int:
        """Return the number of items."""
        return self._searcher.num_items

    @property
    def dim(self) -> int:
        return self._searcher.dim

    @property
    def device(self) -> str:
        return self._searcher.device

    @property
    def similarity(self) -> str | None:
        return None if self._sealed is None else self._sealed.manifest.get("similarity")

    @property
    def model_version(self) -> str | None:
        return None if self._sealed is None else self._sealed.manifest.get("model_version")

    @property
    def item_ids(self) -> pa.Array | None:
        """Return the external id of each item row of a loaded index; read and verified at the first use."""
        if self._item_ids is None and self._sealed is not None:
            self._item_ids = _read_ids(self._sealed, len(self))
        return self._item_ids

    # ------------------------------------------------------------ searching

    def search(
        self, user_BD: np.ndarray, k: int, *, seen: Ragged | None = None, allowed: Allowed | None = None
    ) -> Answer:
        """Return the `k` items of highest score per user: scores float32 and item rows int64, best first.

        Equal scores come by item row, whatever `k` and the batch are. An item on a user's `seen` list is never among
        that user's, nor one that is not `allowed` (see `allow`). A row is shorter than `k`, ending in -inf and -1, only
        where fewer such items exist. Users of several vectors, (B, M, D), are those of `search_merged`. Raises
        ConfigError for shapes, a `k` or a filter that do not fit the index, DataError for vectors with NaN or infinity.
        """
        if np.ndim(user_BD) == 3:
            return self.search_merged(user_BD, k, seen=seen, allowed=allowed)
        user_BD = as_vectors(user_BD, "user")
        self._check(user_BD, k, seen, allowed)
        if seen is not None:
            seen = self._seen_here(seen, allowed)
        if allowed is not None and self.strategy_of(allowed, k) == "exact":
            return self._search_exactly(user_BD, k, seen, allowed)
        if seen is None and 0 < len(user_BD) <= BLOCK:
            return self._search_group(user_BD, k, None, allowed, self._effort(k, 0, allowed))
        num_seen_B = np.zeros(len(user_BD), np.int32) if seen is None else seen.lengths
        score_BK, item_row_BK = empty_answer(len(user_BD), k)
        for effort, users in self._groups(k, num_seen_B, allowed):
            some = None if seen is None else seen.take(users)
            some_BD = np.ascontiguousarray(user_BD[users])
            score_BK[users], item_row_BK[users] = self._search_group(some_BD, k, some, allowed, effort)
        return score_BK, item_row_BK

    def search_unseen(self, user_BD: np.ndarray, k: int, seen: Ragged) -> Answer:
        """Search as `search` does, with a list of seen items for each user."""
        return self.search(user_BD, k, seen=seen)

    def search_merged(
        self, user_BMD: np.ndarray, k: int, *, seen: Ragged | None = None, allowed: Allowed | None = None
    ) -> Answer:
        """Search as `search` does for users with M vectors each: the `k` items with the highest score by any vector.

        One search asks for `k` items per vector: an item among a user's best k is among the best k of the vector that
        scores it highest. Each item is returned once, with that score.
        """
        if user_BMD.ndim != 3 or user_BMD.shape[1] < 1:
            raise ConfigError(f"The users' vectors have shape {user_BMD.shape}. Expected users x vectors x numbers.")
        num_users, per_user, dim = user_BMD.shape
        each = None if seen is None else seen.take(np.repeat(np.arange(len(seen)), per_user))
        found = self.search(user_BMD.reshape(-1, dim), k, seen=each, allowed=allowed)
        return merge_vectors(found, num_users, k)

    def with_breadth(self, factor: float) -> ItemIndex:
        """Return the same index with searches that scan `factor` times the lists, or walk so much more of a graph."""
        efforts = tuple(
            replace(effort, breadth=max(1, round(effort.breadth * factor))) if effort.breadth else effort
            for effort in self.report.efforts
        )
        report = replace(self.report, efforts=efforts)
        return ItemIndex(self._searcher, report, sealed=self._sealed)

    def tuned_k(self, k: int) -> int:
        """Return the least number of neighbours, not below `k`, that searches are tuned for."""
        return effort_for(self.report.efforts, k).k

    def scanned(self, user_BD: np.ndarray, k: int) -> np.ndarray:
        """Return the share of the items (B,) that a search for `k` scores; 1 where it scores all."""
        return self._searcher.scanned_shares(as_vectors(user_BD, "user"), effort_for(self.report.efforts, k))

    def allow(self, mask_I: np.ndarray, strategy: Strategy | None = None) -> Allowed:
        """Return the filter of the items marked in a bool array (I,); `strategy` forces how they are searched.

        Raises ConfigError for another shape or type, DataError for a mask that allows no item.
        """
        allowed = self._searcher.allow(mask_I, strategy)
        if self.strategy_of(allowed, self.report.k) == "exact" and allowed.fits(self.dim):
            self._searcher.exact_items(allowed)
        return allowed

    def strategy_of(self, allowed: Allowed, k: int) -> Strategy:
        """Return how a search for `k` of the allowed items is made, by their number (docs/retrieval-index.md)."""
        effort = self._effort(k, 0, allowed)
        return choose_strategy(allowed, k, effort.scanned_share * len(self), self.dim)

    def _check(self, user_BD: np.ndarray, k: int, seen: Ragged | None, allowed: Allowed | None) -> None:
        if user_BD.shape[1] != self.dim:
            raise ConfigError(
                f"The users' vectors have {user_BD.shape[1]} numbers but the items' of the index {self.dim}: "
                "both must come from the same model."
            )
        if not 1 <= k <= len(self):
            raise ConfigError(f"k is {k:,} but the catalogue has {len(self):,} items: ask for 1 to {len(self):,}.")
        if allowed is not None and len(allowed.mask_I) != len(self):
            raise ConfigError(
                f"The filter is for {len(allowed.mask_I):,} items but the index has {len(self):,}: "
                "make it by this index's `allow`."
            )
        if seen is not None and len(seen) != len(user_BD):
            raise ConfigError(f"{len(user_BD):,} users but {len(seen):,} lists of seen items: give one list each.")

    def _seen_here(self, seen: Ragged, allowed: Allowed | None) -> Ragged | None:
        """Return the seen items once each, without those that cannot be found anyway; None if there are none."""
        seen = seen.distinct()
        is_here = (seen.values >= 0) & (seen.values < len(self))
        if allowed is not None:
            is_here &= allowed.mask_I[np.where(is_here, seen.values, 0)]
        return (seen if is_here.all() else seen.where(is_here)) if is_here.any() else None

    def _effort(self, k: int, num_seen: int, allowed: Allowed | None) -> SearchEffort:
        """Return the effort that finds `k` allowed and unseen items: that of the neighbours which contain them.

        It is the same for every `k` up to a tuned one, so that a shorter answer is the head of a longer one.
        """
        neighbours = self.tuned_k(k) + num_seen
        if allowed is not None:
            neighbours = round(neighbours / allowed.share)
        return effort_for(self.report.efforts, min(neighbours, len(self)))

    def _groups(
        self, k: int, num_seen_B: np.ndarray, allowed: Allowed | None
    ) -> Iterator[tuple[SearchEffort, np.ndarray]]:
        """Return groups of users of one effort, which does not depend on who else is in the batch."""
        lengths, which_B = np.unique(num_seen_B, return_inverse=True)
        efforts = [self._effort(k, int(length), allowed) for length in lengths]
        for effort in dict.fromkeys(efforts):
            users = np.flatnonzero(np.array([each == effort for each in efforts])[which_B])
            for block in blocks_by_length(num_seen_B[users], extra=k):
                for start in range(0, len(block), BLOCK):
                    yield effort, np.sort(users[block[start : start + BLOCK]])

    def _search_group(
        self, user_BD: np.ndarray, k: int, seen: Ragged | None, allowed: Allowed | None, effort: SearchEffort
    ) -> Answer:
        """Search to the given effort; answers that come back short again, more widely."""
        num_items = len(self) if allowed is None else len(allowed.item_rows)
        most_seen = 0 if seen is None else int(seen.lengths.max(initial=0))
        tuned_k = k if allowed is None else self.tuned_k(k)  # see _search_deeper
        width = min(tuned_k + most_seen, num_items)
        found = self._searcher.search(user_BD, width, effort, allowed)
        if allowed is not None:
            last_B = tuned_k - 1 + (np.zeros(len(user_BD), np.int32) if seen is None else seen.lengths)
            found = self._search_deeper(user_BD, last_B, effort, allowed, found)
        answer = _unseen(found, seen, k)
        if answer[1][:, -1].min() >= 0:
            return answer
        wanted_B = np.minimum(k, num_items - (0 if seen is None else seen.lengths))
        score_BK, item_row_BK = (part.copy() for part in answer)
        wider = effort_for(self.report.efforts, WIDER * effort.k)
        for again in (wider, self._searcher.everything(width)):
            short = np.flatnonzero((item_row_BK >= 0).sum(axis=1) < wanted_B)
            if not len(short):
                break
            some_BD = np.ascontiguousarray(user_BD[short])
            some = None if seen is None else seen.take(short)
            found = self._searcher.search(some_BD, width, again, allowed)
            score_BK[short], item_row_BK[short] = _unseen(found, some, k)
        return score_BK, item_row_BK

    def _search_deeper(
        self, user_BD: np.ndarray, last_B: np.ndarray, effort: SearchEffort, allowed: Allowed, found: Answer
    ) -> Answer:
        """Search again for users whose allowed items rank much lower among all items than was expected.

        A filter that excludes what a user would get (a category the user dislikes) leaves items that the effort for its
        share of the catalogue was not tuned to find. The item at place `last_B` decides, which is not that of `k` but
        of the next tuned one: whether a search is repeated must not depend on `k`.
        """
        num_found_B = (found[1] >= 0).sum(axis=1)
        place_B = np.maximum(np.minimum(last_B, num_found_B - 1), 0)
        rank_B = self._searcher.ranks(user_BD, found[0][np.arange(len(user_BD)), place_B])
        deep = np.flatnonzero((rank_B > DEEPER * effort.k) & (num_found_B > 0))
        if not len(deep):
            return found
        width = found[1].shape[1]
        score_BC, item_row_BC = (part.copy() for part in found)
        efforts = [effort_for(self.report.efforts, min(int(rank), len(self))) for rank in rank_B[deep]]
        for each in dict.fromkeys(efforts):
            users = deep[[one == each for one in efforts]]
            some_BD = np.ascontiguousarray(user_BD[users])
            score_BC[users], item_row_BC[users] = self._searcher.search(some_BD, width, each, allowed)
        return score_BC, item_row_BC

    def _search_exactly(self, user_BD: np.ndarray, k: int, seen: Ragged | None, allowed: Allowed | None) -> Answer:
        num_items = len(self) if allowed is None else len(allowed.item_rows)
        if seen is None:
            return _unseen(self._searcher.search_exactly(user_BD, min(k, num_items), allowed), None, k)
        score_BK, item_row_BK = empty_answer(len(user_BD), k)
        for users in blocks_by_length(seen.lengths, extra=k):
            some = seen.take(users)
            width = min(k + int(some.lengths.max(initial=0)), num_items)
            some_BD = np.ascontiguousarray(user_BD[users])
            found = self._searcher.search_exactly(some_BD, width, allowed)
            score_BK[users], item_row_BK[users] = _unseen(found, some, k)
        return score_BK, item_row_BK

    # ------------------------------------------------------------ saving and loading

    def save(self, folder: Path, *, model_version: str, item_ids: pa.Array, similarity: str) -> None:
        """Write index-*.faiss, items.parquet and manifest.json; an older index stays until all is written.

        `item_ids` are the outside ids of the item rows, in order.
        """
        if len(item_ids) != len(self):
            raise DataError(f"{len(item_ids):,} item ids for an index of {len(self):,} items: give one per item row.")
        with new_folder(Path(folder)) as writing:
            parts = self._searcher.shards
            self._searcher.drop_direct_maps()  # else they are written, too
            names = [f"index-{number:05d}-of-{len(parts):05d}.faiss" for number in range(len(parts))]
            for name, part in zip(names, parts, strict=True):
                faiss.write_index(part.whole, str(writing / name))
            items = pa.table({"item_row": np.arange(len(self), dtype=np.int64), "item_id": item_ids})
            pq.write_table(items, writing / ITEMS, write_page_checksum=True)
            facts = {
                "model_version": model_version,
                "similarity": similarity,
                "metric": "inner_product",
                "dim": self.dim,
                "items": len(self),
                "report": asdict(self.report),
                "heads": {name: _head_digest(writing / name) for name in names},
                "versions": {"faiss": faiss.__version__, "numpy": np.__version__, "pyarrow": pa.__version__},
            }
            seal(writing, facts)

    @classmethod
    def load(
        cls, folder: Path, *, model_version: str | None = None, device: Device = "auto", mapped: bool = False
    ) -> ItemIndex:
        """Load the index saved in `folder`, with every byte verified; on the GPU if `device` and the machine allow.

        `mapped`: read by the operating system as searches need it, and shared with other processes that map it; only
        the files' sizes and their first MiB, with the lists' layout, are verified. A newer index may take the folder's
        place meanwhile. Raises ConfigError when it was built from another model than `model_version` (None: any),
        DataError for a missing, damaged or foreign file.
        """
        folder = Path(folder)
        try:
            sealed = SealedFolder.open(folder, MEND, verified=not mapped)
        except FileNotFoundError:
            raise DataError(f"There is no index in {folder}, its {MANIFEST} is missing: {MEND}") from None
        manifest = sealed.manifest
        if "heads" not in manifest or "report" not in manifest:
            raise DataError(f"{folder} is not an index, or one of an older version: {MEND}")
        if foreign := set(manifest["heads"]) - set(manifest["files"]):  # only those stay in the folder for certain
            raise DataError(f"{folder / MANIFEST} names {min(foreign)!r} but does not list it: do not trust it; {MEND}")
        is_older = any(not str(digest).startswith("xxh3-") for digest in manifest["heads"].values())
        if is_older or "efforts" not in manifest["report"]:
            raise DataError(f"{folder} is an index of an older version, which this version does not read: {MEND}")
        if model_version is not None and manifest["model_version"] != model_version:
            raise ConfigError(
                f"The index in {folder} was built from model {manifest['model_version']}, "
                f"but the model is now {model_version}: export and index again (trec-twotower export RUN, then "
                "trec-twotower index RUN), or name the checkpoint it was built from (--checkpoint)."
            )
        wholes = [_read_index(sealed, name, mapped=mapped) for name in manifest["heads"]]
        report = IndexReport.read(manifest["report"])
        blas_batch = report.settings.get("blas_batch", BLAS_BATCH)
        searcher = make_searcher(wholes, device, refine_factor=report.refine_factor, blas_batch=blas_batch)
        if searcher.num_items != manifest["items"]:
            raise DataError(f"{folder} holds {searcher.num_items:,} items, not {manifest['items']:,}: {MEND}")
        index = cls(searcher, report, sealed=sealed)
        if not mapped:
            index._item_ids = _read_ids(sealed, len(index))
        return index


def _unseen(found: Answer, seen: Ragged | None, k: int) -> Answer:
    """Return the first `k` items of each row that are not on the user's list, where there is one."""
    if seen is None and found[1].shape[1] == k:
        return found
    return without_seen(found, Ragged.empty(len(found[1])) if seen is None else seen, k)


def _read_index(sealed: SealedFolder, name: str, *, mapped: bool) -> Any:
    """Read one of the FAISS indexes of a folder from the verified file."""
    flags = 0
    if mapped:
        _check_head(sealed, name)
        flags = _how_to_map(sealed.manifest)
    usual = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(sealed.num_bytes(name))  # no part exceeds the whole
    try:
        index = faiss.read_index(str(sealed.path(name)), flags)
    except RuntimeError as error:
        path = sealed.folder / name
        raise DataError(f"{path} is no index that FAISS reads ({error_text(error)}): {MEND}") from None
    finally:
        faiss.set_deserialization_vector_byte_limit(usual)  # for whoever reads other indexes in this process
    without_prefetch_threads(index)
    return index


def _read_ids(sealed: SealedFolder, num_items: int) -> pa.Array:
    sealed.verify(ITEMS)
    ids = pq.read_table(sealed.path(ITEMS), columns=["item_id"])["item_id"].combine_chunks()
    if len(ids) != num_items:
        raise DataError(f"{sealed.folder / ITEMS} has {len(ids):,} ids for {num_items:,} items: {MEND}")
    return ids


def _how_to_map(manifest: dict[str, Any]) -> int:
    """Return FAISS's I/O flag: one maps only the lists, the other maps everything, in 1 ms per thousand lists."""
    report = manifest["report"]
    only_lists = report["lists"] and not any(word in report["kind"] for word in ("fs", "Refine", "RFlat"))
    return faiss.IO_FLAG_MMAP if only_lists else faiss.IO_FLAG_MMAP_IFC


def _head_digest(path: Path) -> str:
    """Return a digest that detects accidental changes only, in a hundredth of a millisecond."""
    with path.open("rb") as file:
        return f"xxh3-{xxhash.xxh3_64_hexdigest(file.read(HEAD_BYTES))}"


def _check_head(sealed: SealedFolder, name: str) -> None:
    sealed.verify_size(name)
    if _head_digest(sealed.path(name)) != sealed.manifest["heads"][name]:
        path = sealed.folder / name
        raise DataError(f"{path} is damaged (the digest of its first {HEAD_BYTES:,} bytes differs): {MEND}")
