"""A built index: searched without seen items, with filters, for several vectors a user; saved, loaded, mapped."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from trec_twotower.artefacts import SealedFolder, new_folder
from trec_twotower.data.lists import Lists
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.files import MANIFEST, seal
from trec_twotower.index.engine import Device, as_vectors, faiss, merged, reason_of
from trec_twotower.index.filters import Allowed, Race, Way, likely_ways, make_allowed, num_to_fetch
from trec_twotower.index.list_scan import TOGETHER
from trec_twotower.index.probing import Fit, fit_for
from trec_twotower.index.scan import Answer, Scanner
from trec_twotower.metrics import blocks_by_length, first_kept

MEND = "build the index again: trec-twotower index RUN"
ITEMS = "items.parquet"
HEAD_BYTES = 1 << 20  # of each index file, read and verified before it is mapped
BLOCK = 4096  # users that are searched for together
WIDER = 4  # times the lists, where an answer came back short


@dataclass(frozen=True)
class IndexReport:
    """How an index was built and what it reaches; saved in its manifest."""

    kind: str  # FAISS's factory string: IVF404,SQfp16
    device: str  # where it was tuned: cpu or gpu
    lists: int  # 0: it has none
    shards: int
    k: int  # neighbours the recall is of, at most the catalogue
    fits: tuple[Fit, ...]  # how much is scanned for k, 4 k and 16 k neighbours
    refine_factor: int  # times k that are scored again, where the kind does so
    target_recall: float
    reached_recall: float  # on users the tuning did not see, as all below
    scanned_share: float  # of the catalogue, per user
    scanned_most: float  # by the hundredth of users that scan most
    mean_lists: float
    curve: tuple[tuple[float, float, float], ...]  # recall, scanned share, users/s one thread after another's batch
    bytes: int
    build_s: float  # of all before the tuning: exact search, training, and add_s
    add_s: float  # of reading and adding the items
    tune_s: float
    settings: dict[str, Any] = field(default_factory=dict)  # the index's part of the config, as it was built with

    def in_words(self) -> str:
        """What was built and what it reaches, for people to read."""
        how = f"{self.shards} x {self.kind}" if self.shards > 1 else self.kind
        lists = f"{self.mean_lists:.1f} of {self.lists:,} lists and " if self.lists else ""
        most = f" (at most {self.scanned_most:.1%} for 99 of 100 users)" if self.lists else ""
        return (
            f"{how} on {self.device}; recall@{self.k} against exact search {self.reached_recall:.4f} "
            f"(target {self.target_recall}) on users not tuned for, scanning {lists}{self.scanned_share:.1%} of the "
            f"items{most}, {self.bytes / 1e6:.1f} MB, built in {self.build_s + self.tune_s:.1f} s"
        )

    @classmethod
    def read(cls, saved: dict[str, Any]) -> IndexReport:
        """A report out of a manifest."""
        fits = tuple(Fit(**{**fit, "weights": tuple(fit["weights"])}) for fit in saved["fits"])
        return cls(**{**saved, "fits": fits, "curve": tuple(map(tuple, saved["curve"]))})


class ItemIndex:
    """The catalogue's nearest-neighbour search; made by `build_index` or `ItemIndex.load`."""

    def __init__(
        self,
        scanner: Scanner,
        report: IndexReport,
        *,
        sealed: SealedFolder | None = None,
    ) -> None:
        """`sealed` is the folder that it was loaded from, which has the items' ids."""
        self._scanner = scanner
        self.report = report
        self._sealed = sealed
        self._item_ids: pa.Array | None = None

    def __len__(self) -> int:
        """How many items."""
        return self._scanner.num_items

    @property
    def dim(self) -> int:
        return self._scanner.dim

    @property
    def device(self) -> str:
        return self._scanner.device

    @property
    def similarity(self) -> str | None:
        return None if self._sealed is None else self._sealed.manifest.get("similarity")

    @property
    def model_version(self) -> str | None:
        return None if self._sealed is None else self._sealed.manifest.get("model_version")

    @property
    def item_ids(self) -> pa.Array | None:
        """The outside id of each item row, of a loaded index; read and verified at the first use."""
        if self._item_ids is None and self._sealed is not None:
            self._item_ids = _read_ids(self._sealed, len(self))
        return self._item_ids

    # ------------------------------------------------------------ searching

    def search(
        self, user_BD: np.ndarray, k: int, *, seen: Lists | None = None, allowed: Allowed | None = None
    ) -> Answer:
        """The `k` items of highest score per user: scores float32 and item rows int64, best first.

        An item on a user's `seen` list is never among that user's, nor one that is not `allowed` (see `allow`). A row
        is shorter than `k`, ending in -inf and -1, only when fewer such items exist: rows that come back short scan
        more lists, all in the end. Users of several vectors, (B, M, D), are those of `search_merged`.
        """
        if np.ndim(user_BD) == 3:
            return self.search_merged(user_BD, k, seen=seen, allowed=allowed)
        user_BD = as_vectors(user_BD, "user")
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
        if seen is None or not len(seen.values):
            if len(user_BD) <= BLOCK:
                return self._search_block(user_BD, k, None, allowed)
            blocks, seen = [np.arange(len(user_BD))], None
        else:
            seen = self._seen_here(seen, allowed)
            blocks = list(blocks_by_length(seen.lengths, extra=k))
        score_BK, item_row_BK = empty_answer(len(user_BD), k)
        for block in blocks:
            for start in range(0, len(block), BLOCK):
                users = block[start : start + BLOCK]
                taken = None if seen is None else seen.take(users)
                score_BK[users], item_row_BK[users] = self._search_block(user_BD[users], k, taken, allowed)
        return score_BK, item_row_BK

    def search_unseen(self, user_BD: np.ndarray, k: int, seen: Lists) -> Answer:
        """As `search`, with a list of seen items for each user."""
        return self.search(user_BD, k, seen=seen)

    def search_merged(
        self, user_BMD: np.ndarray, k: int, *, seen: Lists | None = None, allowed: Allowed | None = None
    ) -> Answer:
        """As `search`, for users of M vectors each: the `k` items of highest score by any of a user's vectors.

        One search asks for `k` items a vector: an item among a user's best k is among the best k of the vector that
        scores it highest. Each item comes once, with that score.
        """
        if user_BMD.ndim != 3 or user_BMD.shape[1] < 1:
            raise ConfigError(f"The users' vectors have shape {user_BMD.shape}: give users x vectors x numbers.")
        num_users, per_user, dim = user_BMD.shape
        each = None if seen is None else seen.take(np.repeat(np.arange(len(seen)), per_user))
        found = self.search(user_BMD.reshape(-1, dim), k, seen=each, allowed=allowed)
        return merged(found, num_users, k)

    def with_margins(self, factor: float) -> ItemIndex:
        """The same index, which scans the more the larger `factor` is; 1 is as tuned."""
        fits = tuple(replace(fit, margin=fit.margin * factor) if fit.margin > 0 else fit for fit in self.report.fits)
        return ItemIndex(self._scanner, replace(self.report, fits=fits), sealed=self._sealed)

    def scanned(self, user_BD: np.ndarray, k: int) -> np.ndarray:
        """The share of the items (B,) that lies in the lists that a search for `k` scans; 1 without lists."""
        scanner = self._scanner
        if scanner.coarse is None:
            return np.ones(len(user_BD))
        chosen = scanner.choose_lists(as_vectors(user_BD, "user"), k, fit_for(self.report.fits, k))
        return scanner.scanned(chosen.list_BP)

    def allow(self, mask_I: np.ndarray, way: Way | None = None) -> Allowed:
        """The items marked in a bool array (I,), made ready for searches; `way` forces how they are searched."""
        allowed = make_allowed(self._scanner, mask_I, way)
        if self.way_of(allowed, self.report.k) == "exact":
            allowed.vectors(self._scanner)
        return allowed

    def way_of(self, allowed: Allowed, k: int, num_users: int = 1) -> Way:
        """How a search for `k` of these items goes, as far as it is known."""
        return self._race(allowed, k, num_users).best

    def _race(self, allowed: Allowed, k: int, num_users: int) -> Race:
        if k >= len(allowed.item_rows):
            return Race(["exact"])
        if allowed.way is not None:
            return Race([allowed.way])
        key = (k, num_users >= TOGETHER)
        if key not in allowed.races:
            ways = likely_ways(self._scanner, self.report.fits, len(allowed.item_rows), k)
            allowed.races.setdefault(key, Race(ways))
        return allowed.races[key]

    def _seen_here(self, seen: Lists, allowed: Allowed | None) -> Lists:
        """Seen items once each, without those that could not be found anyway."""
        seen = seen.distinct()
        is_here = (seen.values >= 0) & (seen.values < len(self))
        if allowed is not None:
            is_here &= allowed.mask_I[np.where(is_here, seen.values, 0)]
        return seen if is_here.all() else seen.where(is_here)

    def _search_block(self, user_BD: np.ndarray, k: int, seen: Lists | None, allowed: Allowed | None) -> Answer:
        if seen is None and allowed is None:
            found = self._scan(user_BD, k, fit_for(self.report.fits, k))
            if (found[1][:, -1] >= 0).all():
                return found
        num_items = len(self) if allowed is None else len(allowed.item_rows)
        num_seen_B = seen.lengths if seen is not None else np.zeros(len(user_BD), np.int64)
        wanted_B = np.minimum(k, num_items - num_seen_B)
        fetched = min(k + int(num_seen_B.max(initial=0)), num_items)

        found = self._kept(self._first_try(user_BD, fetched, allowed), k, seen, allowed)
        short = np.flatnonzero((found[1] >= 0).sum(axis=1) < wanted_B)
        attempt = 0
        while len(short):
            again = self._wider_try(np.ascontiguousarray(user_BD[short]), fetched, allowed, attempt)
            again = self._kept(again, k, None if seen is None else seen.take(short), allowed)
            found[0][short], found[1][short] = again
            short = short[(again[1] >= 0).sum(axis=1) < wanted_B[short]]
            attempt += 1
        return found

    def _kept(self, found: Answer, k: int, seen: Lists | None, allowed: Allowed | None) -> Answer:
        """The first `k` that are neither seen nor forbidden."""
        score_BC, item_row_BC = found
        if seen is None and allowed is None and item_row_BC.shape[1] == k:
            return score_BC, item_row_BC
        keep_BC = item_row_BC >= 0
        if seen is not None:
            keep_BC &= ~seen.contain(item_row_BC)
        if allowed is not None:
            keep_BC &= allowed.mask_I[np.where(item_row_BC >= 0, item_row_BC, 0)]
        score_BK, item_row_BK = first_kept(keep_BC, k, (score_BC, -np.inf), (item_row_BC, -1))
        return score_BK, item_row_BK

    def _first_try(self, user_BD: np.ndarray, k: int, allowed: Allowed | None) -> Answer:
        """The best `k` as tuned; with `allowed`, by the best way for so many, of which overfetch brings more."""
        if allowed is None:
            return self._scan(user_BD, k, fit_for(self.report.fits, k))
        race = self._race(allowed, k, len(user_BD))
        way, is_timed = race.next_way()
        if not is_timed or not len(user_BD):
            return self._by_way(way, user_BD, k, allowed)
        if way == "exact":
            allowed.vectors(self._scanner)  # later searches have them already
        started = time.perf_counter()
        found = self._kept(self._by_way(way, user_BD, k, allowed), k, None, allowed)
        race.tell(way, (time.perf_counter() - started) / len(user_BD))
        return found

    def _by_way(self, way: Way, user_BD: np.ndarray, k: int, allowed: Allowed) -> Answer:
        scanner, fits = self._scanner, self.report.fits
        if way == "exact":
            return self._scan_allowed(user_BD, k, allowed)
        if way == "overfetch":
            fetched = min(num_to_fetch(k, allowed.share), len(self))
            return self._scan(user_BD, fetched, fit_for(fits, fetched))
        fit = fit_for(fits, min(round(k / allowed.share), len(self)))
        if scanner.coarse is None:
            return scanner.scan_codes(user_BD, k, fit.most_lists, allowed.bitmap)
        return self._select(user_BD, k, fit, allowed)

    def _select(self, user_BD: np.ndarray, k: int, fit: Fit, allowed: Allowed) -> Answer:
        """Lists scanned for allowed items; once more where the k-th best is worse than foretold, by what it is.

        A filter that knows of the scores, such as a category, leaves fewer good items than its share tells.
        """
        scanner = self._scanner
        chosen = scanner.choose_lists(user_BD, k, fit, size_L=allowed.size_L)
        found = scanner.scan_lists(user_BD, k, chosen, allowed.bitmap)
        reached_B = found[0][:, -1]
        assert chosen.foretold_B is not None
        again = np.flatnonzero(np.isfinite(reached_B) & (reached_B < chosen.foretold_B - max(fit.margin, 0) / 4))
        if len(again):
            user_BD = np.ascontiguousarray(user_BD[again])
            chosen = scanner.choose_lists(user_BD, k, fit, size_L=allowed.size_L, known_B=reached_B[again])
            found[0][again], found[1][again] = scanner.scan_lists(user_BD, k, chosen, allowed.bitmap)
        return found

    def _scan(self, user_BD: np.ndarray, k: int, fit: Fit, most: int | None = None) -> Answer:
        scanner = self._scanner
        if scanner.coarse is None:
            return scanner.scan_codes(user_BD, k, most or max(fit.most_lists, k))
        return scanner.scan_lists(user_BD, k, scanner.choose_lists(user_BD, k, fit, most=most))

    def _wider_try(self, user_BD: np.ndarray, k: int, allowed: Allowed | None, attempt: int) -> Answer:
        """A search that scans more with each attempt, and all there is in the end."""
        scanner = self._scanner
        fit = fit_for(self.report.fits, k)
        most = fit.most_lists * WIDER ** (attempt + 1)
        if scanner.coarse is None and (not scanner.is_graph or most >= len(self)):
            every = allowed or self.allow(np.ones(len(self), bool), "exact")
            return self._scan_allowed(user_BD, k, every)
        assert scanner.coarse is None or attempt == 0 or most < WIDER * scanner.num_lists, "all lists came back short"
        if scanner.coarse is not None and scanner.coarse.is_lossy and most >= scanner.num_lists:
            every = allowed or self.allow(np.ones(len(self), bool), "exact")
            return self._scan_allowed(user_BD, k, every)
        bitmap = None if allowed is None else allowed.bitmap
        if scanner.coarse is None:
            return scanner.scan_codes(user_BD, k, most, bitmap)
        size_L = None if allowed is None else allowed.size_L
        return scanner.scan_lists(user_BD, k, scanner.choose_lists(user_BD, k, fit, size_L=size_L, most=most), bitmap)

    def _scan_allowed(self, user_BD: np.ndarray, k: int, allowed: Allowed) -> Answer:
        return self._scanner.scan_some(user_BD, k, allowed.item_rows, allowed.vectors(self._scanner))

    # ------------------------------------------------------------ saving and loading

    def save(self, folder: Path, *, model_version: str, item_ids: pa.Array, similarity: str) -> None:
        """Write index-*.faiss, items.parquet and manifest.json; an older index stays until all is written.

        `item_ids` are the outside ids of the item rows, in order.
        """
        if len(item_ids) != len(self):
            raise DataError(f"{len(item_ids):,} item ids for an index of {len(self):,} items: give one per item row.")
        with new_folder(Path(folder)) as writing:
            parts = self._scanner.parts
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
        """The index saved in `folder`, on the GPU where `device` and the machine allow, every byte verified.

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
        if any(not str(digest).startswith("xxh3-") for digest in manifest["heads"].values()):
            raise DataError(f"{folder} is an index of an older version: {MEND}")
        if model_version is not None and manifest["model_version"] != model_version:
            raise ConfigError(
                f"The index in {folder} was built from model {manifest['model_version']}, "
                f"but the model is now {model_version}: export and index again (trec-twotower export RUN, then "
                "trec-twotower index RUN), or name the checkpoint it was built from (--checkpoint)."
            )
        wholes = [_read_index(sealed, name, mapped=mapped) for name in manifest["heads"]]
        report = IndexReport.read(manifest["report"])
        scanner = Scanner(wholes, device, report.refine_factor)
        if scanner.num_items != manifest["items"]:
            raise DataError(f"{folder} holds {scanner.num_items:,} items, not {manifest['items']:,}: {MEND}")
        index = cls(scanner, report, sealed=sealed)
        if not mapped:
            index._item_ids = _read_ids(sealed, len(index))
        return index


def _read_index(sealed: SealedFolder, name: str, *, mapped: bool) -> Any:
    """One of FAISS's indexes of a folder, from the file that was verified."""
    flags = 0
    if mapped:
        _check_head(sealed, name)
        flags = _how_to_map(sealed.manifest)
    usual = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(sealed.num_bytes(name))  # no part exceeds the whole
    try:
        return faiss.read_index(str(sealed.path(name)), flags)
    except RuntimeError as error:
        path = sealed.folder / name
        raise DataError(f"{path} is no index that FAISS reads ({reason_of(error)}): {MEND}") from None
    finally:
        faiss.set_deserialization_vector_byte_limit(usual)  # for whoever reads other indexes in this process


def empty_answer(num_users: int, k: int) -> Answer:
    return np.full((num_users, k), -np.inf, np.float32), np.full((num_users, k), -1, np.int64)


def _read_ids(sealed: SealedFolder, num_items: int) -> pa.Array:
    sealed.verify(ITEMS)
    ids = pq.read_table(sealed.path(ITEMS), columns=["item_id"])["item_id"].combine_chunks()
    if len(ids) != num_items:
        raise DataError(f"{sealed.folder / ITEMS} has {len(ids):,} ids for {num_items:,} items: {MEND}")
    return ids


def _how_to_map(manifest: dict[str, Any]) -> int:
    """FAISS's flag. One maps lists at once, but nothing else; the other maps all, by a millisecond a thousand lists."""
    report = manifest["report"]
    only_lists = report["lists"] and not any(word in report["kind"] for word in ("fs", "Refine", "RFlat"))
    return faiss.IO_FLAG_MMAP if only_lists else faiss.IO_FLAG_MMAP_IFC


def _head_digest(path: Path) -> str:
    """Of accidents alone it is to tell, and that in a hundredth of a millisecond."""
    with path.open("rb") as file:
        return f"xxh3-{xxhash.xxh3_64_hexdigest(file.read(HEAD_BYTES))}"


def _check_head(sealed: SealedFolder, name: str) -> None:
    sealed.verify_size(name)
    if _head_digest(sealed.path(name)) != sealed.manifest["heads"][name]:
        path = sealed.folder / name
        raise DataError(f"{path} is damaged (the digest of its first {HEAD_BYTES:,} bytes differs): {MEND}")
