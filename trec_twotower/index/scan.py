"""FAISS indexes that share the catalogue, on CPU or GPU, behind one search that scans what each user needs."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from trec_twotower.errors import ConfigError
from trec_twotower.index.engine import (
    GPU_LIMIT,
    Device,
    best_of_all,
    faiss,
    reason_of,
    to_gpu,
    use_blas_well,
    uses_gpu,
)
from trec_twotower.index.list_scan import ListScan, list_places
from trec_twotower.index.probing import Coarse, Fit

AGAIN_NUMBERS = 1 << 18  # of vectors scored again together: 1 MiB, which stays in the cache
SORTED_FROM = 64  # users; in a larger batch those of like lists go after each other, which then lie in the cache

SELECTING = (faiss.IndexFlat, faiss.IndexScalarQuantizer)  # without lists, but with a filter; PQ codes have none

Answer = tuple[np.ndarray, np.ndarray]  # scores (B, K) float32 and item rows (B, K) int64, ending in -1


class Chosen(NamedTuple):
    """The lists that a batch of users scans."""

    score_BP: np.ndarray  # of their centroids, best first
    list_BP: np.ndarray  # -1 after a user's last
    foretold_B: np.ndarray | None  # each user's k-th best score
    bound_B: np.ndarray | None = None  # what that reaches for all but few users


class Part:
    """One FAISS index, taken apart: transforms of the vectors, what is scanned, and what scores the best again."""

    def __init__(self, whole: Any, first_row: int = 0) -> None:
        self._owner = whole  # FAISS's downcasts do not keep what they point to
        self.whole = faiss.downcast_index(whole)
        self.first_row = first_row
        self.num_items = self.whole.ntotal
        inner = self.whole
        if isinstance(inner, faiss.IndexIDMap | faiss.IndexIDMap2):
            raise ConfigError(
                "index.factory has an IDMap, which hides the lists from tuning and is not needed: item rows are ids "
                "already. Leave it out."
            )
        self.refine: Any = None
        self.wrappers = []  # what stands around the scanned index
        if isinstance(inner, faiss.IndexRefine):
            self.wrappers.append(inner)
            self.refine = faiss.downcast_index(inner.refine_index)
            inner = faiss.downcast_index(inner.base_index)
            if not isinstance(self.refine, faiss.IndexFlatCodes):
                raise ConfigError(
                    f"index.factory scores the best again by a {type(self.refine).__name__}, which does not hold the "
                    "items in order: take RFlat, Refine(SQfp16) or Refine(SQ8)."
                )
        self._transforms = []
        if isinstance(inner, faiss.IndexPreTransform):
            self.wrappers.append(inner)
            self._transforms = [faiss.downcast_VectorTransform(inner.chain.at(i)) for i in range(inner.chain.size())]
            inner = faiss.downcast_index(inner.index)
        self.base = inner
        self.has_lists = isinstance(inner, faiss.IndexIVF)
        self.is_graph = isinstance(inner, faiss.IndexHNSW)
        if not (self.has_lists or self.is_graph or isinstance(inner, SELECTING)):
            raise ConfigError(
                f"index.factory makes a {type(inner).__name__}, which cannot be tuned or filtered here: take Flat or "
                "SQ codes, IVF lists of them or of PQ codes, or HNSW, with OPQ, PCA or RR in front and Refine or RFlat "
                "behind if wanted."
            )
        if self.has_lists:
            self.quantizer = faiss.downcast_index(inner.quantizer)
            if not isinstance(self.quantizer, faiss.IndexFlat | faiss.IndexHNSWFlat):
                raise ConfigError(
                    f"index.factory finds its lists by a {type(self.quantizer).__name__}: take IVF1024 or the like, or "
                    "IVF65536_HNSW32."
                )
        for each in (self.whole, inner, *([self.quantizer] if self.has_lists else [])):
            if each.metric_type != faiss.METRIC_INNER_PRODUCT:
                raise ConfigError(
                    f"{type(each).__name__} compares by another metric than the inner product, by which users and "
                    "items are scored: build the index with METRIC_INNER_PRODUCT."
                )
        self._refined_codes = _codes_view(self.refine)
        self.list_scan: ListScan | None = None
        self.knows_list_scan = False  # whether it was looked for

    @property
    def rounds(self) -> bool:
        """Whether its scores are of vectors in fewer bits than they came."""
        return not isinstance(self.refine if self.refine is not None else self.base, faiss.IndexFlat)

    @property
    def has_codes(self) -> bool:
        """Whether the lists hold codes that are learned; plain numbers are not."""
        if isinstance(self.base, faiss.IndexIVFScalarQuantizer):
            plain = (faiss.ScalarQuantizer.QT_fp16, faiss.ScalarQuantizer.QT_bf16)
            return self.base.sq.qtype not in plain
        return not isinstance(self.base, faiss.IndexIVFFlat)

    def transformed(self, vectors: np.ndarray) -> np.ndarray:
        """What the lists hold of vectors."""
        for transform in self._transforms:
            vectors = transform.apply(vectors)
        return vectors

    def train_transforms(self, item_CD: np.ndarray) -> None:
        for transform in self._transforms:
            if not transform.is_trained:
                transform.train(item_CD)
            item_CD = transform.apply(item_CD)

    def list_sizes(self) -> np.ndarray:
        return list_places(self.base)[0]

    def ids_of_list(self, number: int) -> np.ndarray:
        """The rows, within this part, of a list's items."""
        lists = self.base.invlists
        size = lists.list_size(number)
        return faiss.rev_swig_ptr(lists.get_ids(number), size) if size else np.empty(0, np.int64)

    def scored_again(self, user_BD: np.ndarray, row_BC: np.ndarray, k: int) -> Answer:
        """The best `k` of the rows found, by the refining vectors."""
        score_BC = np.empty(row_BC.shape, np.float32)
        block = max(1, AGAIN_NUMBERS // (row_BC.shape[1] * self.refine.d))
        for start in range(0, len(row_BC), block):
            users = slice(start, start + block)
            safe_BC = np.maximum(row_BC[users], 0)
            if self._refined_codes is not None:
                item_BCD = self._refined_codes.take(safe_BC, axis=0)
                item_BCD = torch.from_numpy(item_BCD).float().numpy()  # a tenth of the time of numpy's astype
            else:
                code_IC = _bytes_of(self.refine)  # decoded together: one at a time takes 20 times as long
                item_BCD = self.refine.sa_decode(code_IC.take(safe_BC.reshape(-1), axis=0)).reshape(*safe_BC.shape, -1)
            score_BC[users] = (item_BCD @ user_BD[users, :, None])[:, :, 0]
        score_BC[row_BC < 0] = -np.inf
        order_BK = np.argsort(-score_BC, axis=1)[:, :k]
        return np.take_along_axis(score_BC, order_BK, axis=1), np.take_along_axis(row_BC, order_BK, axis=1)


def _codes_view(refine: Any) -> np.ndarray | None:
    """The refining vectors themselves where they are float32 or float16, not copied."""
    if isinstance(refine, faiss.IndexScalarQuantizer) and refine.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        dtype: type[np.floating] = np.float16
    elif isinstance(refine, faiss.IndexFlat):
        dtype = np.float32
    else:
        return None
    return _bytes_of(refine).view(dtype) if refine.ntotal else None


def _bytes_of(codes: Any) -> np.ndarray:
    """The codes (I, bytes) of an index that keeps them in one piece, not copied."""
    flat = faiss.rev_swig_ptr(codes.codes.data(), codes.ntotal * codes.code_size)
    return flat.reshape(codes.ntotal, codes.code_size)


class Scanner:
    """All parts of the catalogue and, where wanted, their copies on GPUs."""

    def __init__(self, wholes: Sequence[Any], device: Device, refine_factor: int = 1) -> None:
        self.parts: list[Part] = []
        for whole in wholes:
            self.parts.append(Part(whole, self.parts[-1].first_row + self.parts[-1].num_items if self.parts else 0))
        first = self.parts[0]
        self.dim = first.whole.d
        self.num_items = sum(part.num_items for part in self.parts)
        self.refine_factor = refine_factor  # how many times k are scored again
        self.is_graph = first.is_graph
        self._lock = threading.Lock()
        self._list_of_item: np.ndarray | None = None
        self._on_gpu = _gpu_copies(self.parts, device) if uses_gpu(device) else None
        self.device = "gpu" if self._on_gpu else "cpu"

    @cached_property
    def coarse(self) -> Coarse | None:
        """The lists' centroids and sizes, None without lists; read at the first use: it takes longer than a load."""
        first = self.parts[0]
        if not first.has_lists:
            return None
        sizes = np.sum([part.list_sizes() for part in self.parts], axis=0)
        return Coarse(first.quantizer, sizes, on_gpu=bool(self._on_gpu))

    @property
    def num_lists(self) -> int:
        return self.coarse.num_lists if self.coarse is not None else 0

    # ------------------------------------------------------------ which lists

    def choose_lists(
        self,
        user_BD: np.ndarray,
        k: int,
        fit: Fit,
        *,
        size_L: np.ndarray | None = None,
        known_B: np.ndarray | None = None,
        most: int | None = None,
    ) -> Chosen:
        """The lists to scan for the best `k`.

        `size_L`: items that count, by list; lists of none are left out. `known_B`: a score that the k-th best is known
        to reach, in place of a foretold one. `most`: so many lists for everybody.
        """
        assert self.coarse is not None
        without_L = size_L == 0 if size_L is not None else None
        vector_BD = self.parts[0].transformed(user_BD)
        width = min(most or (fit.most_lists if known_B is None else self.num_lists), self.num_lists)
        if most is None:
            chosen = self.coarse.choose(vector_BD, k, fit, size_L, known_B, width)
            if chosen is not None:
                return Chosen(*chosen, chosen[-1] - fit.spread)
        score_BP, list_BP = self.coarse.nearest(vector_BD, width, without_L)
        bound_B = None
        if most is None:
            if known_B is None:
                size_BP = (self.coarse.size_L if size_L is None else size_L)[list_BP]
                known_B = fit.foretell(score_BP, size_BP, k)
            bound_B = known_B - fit.spread
            wanted_B = (score_BP >= (known_B - fit.margin)[:, None]).sum(axis=1)
            longest = max(1, int(wanted_B.max(initial=1)))
            score_BP, list_BP = score_BP[:, :longest], list_BP[:, :longest]
            if len(wanted_B) > 1:
                list_BP[np.arange(longest) >= np.maximum(wanted_B, 1)[:, None]] = -1
        if without_L is not None or self.coarse.is_lossy:
            list_BP[score_BP == -np.inf] = -1
        return Chosen(score_BP, list_BP, known_B, bound_B)

    def scanned(self, list_BP: np.ndarray) -> np.ndarray:
        """The share of the catalogue that lies in each user's lists."""
        assert self.coarse is not None
        size_BP = np.where(list_BP >= 0, self.coarse.size_L[list_BP], 0)
        return size_BP.sum(axis=1) / self.num_items

    # ------------------------------------------------------------ scanning them

    def scan_lists(self, user_BD: np.ndarray, k: int, chosen: Chosen, bitmap: np.ndarray | None = None) -> Answer:
        """The best `k` items in the chosen lists, of those whose bit is set."""
        lists = self._list_scan(self.parts[0])
        if len(user_BD) < SORTED_FROM or lists is not None:
            return self._scan(user_BD, k, chosen, bitmap)
        order = np.argsort(chosen.list_BP[:, 0], kind="stable")
        found = self._scan(user_BD[order], k, Chosen(chosen.score_BP[order], chosen.list_BP[order], None), bitmap)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return found[0][back], found[1][back]

    def _scan(self, user_BD: np.ndarray, k: int, chosen: Chosen, bitmap: np.ndarray | None) -> Answer:
        score_BP, list_BP = np.ascontiguousarray(chosen.score_BP), np.ascontiguousarray(chosen.list_BP)
        if self._on_gpu is not None and bitmap is None and k <= GPU_LIMIT:
            return self._on_gpu.scan(self.parts[0].transformed(user_BD), k, score_BP, list_BP)
        fetched = min(k * self.refine_factor, self.num_items) if self.parts[0].refine is not None else k
        # Of one of several parts, or of codes that are scored again, the k-th best is another than foretold
        bound_B = chosen.bound_B if len(self.parts) == 1 and fetched == k else None
        answers = []
        for part in self.parts:
            vector_BD = part.transformed(user_BD)
            lists = self._list_scan(part)
            if lists is not None:
                score_BC, row_BC = lists.scan(vector_BD, fetched, score_BP, list_BP, _bits_of(part, bitmap), bound_B)
            else:
                parameters, kept_alive = _parameters(faiss.SearchParametersIVF, part, bitmap)
                parameters.nprobe = list_BP.shape[1]
                score_BC, row_BC = scan_preassigned(part.base, vector_BD, fetched, score_BP, list_BP, parameters)
                del kept_alive
            if part.refine is not None:
                score_BC, row_BC = part.scored_again(user_BD, row_BC, k)
            answers.append((score_BC, row_BC + part.first_row if part.first_row else row_BC))
        if len(self.parts) == 1:
            return answers[0]
        for part, (_, row_BC) in zip(self.parts, answers, strict=True):
            row_BC[row_BC < part.first_row] = -1  # what was -1 before the part's first row was added
        return merge(answers, k)

    def _list_scan(self, part: Part) -> ListScan | None:
        """Our own loop over the part's lists, where there is one for its kind; made at the first search."""
        if not part.knows_list_scan:
            with self._lock:
                part.list_scan = ListScan.of(part.base)
                part.knows_list_scan = True
        return part.list_scan

    def scan_codes(self, user_BD: np.ndarray, k: int, effort: int, bitmap: np.ndarray | None = None) -> Answer:
        """The best `k` of an index without lists: of all items, or of those a graph of that `effort` comes by."""
        use_blas_well(self.dim)
        if self._on_gpu is not None and bitmap is None and k <= GPU_LIMIT:
            return self._on_gpu.search(self.parts[0].transformed(user_BD), k)
        fetched = min(k * self.refine_factor, self.num_items) if self.parts[0].refine is not None else k
        answers = []
        for part in self.parts:
            kind = faiss.SearchParametersHNSW if part.is_graph else faiss.SearchParameters
            parameters, kept_alive = _parameters(kind, part, bitmap)
            if part.is_graph:
                parameters.efSearch = effort
            score_BC, row_BC = part.base.search(part.transformed(user_BD), fetched, params=parameters)
            del kept_alive
            score_BC[row_BC < 0] = -np.inf
            if part.refine is not None:
                score_BC, row_BC = part.scored_again(user_BD, row_BC, k)
            answers.append((score_BC, np.where(row_BC >= 0, row_BC + part.first_row, -1)))
        return answers[0] if len(self.parts) == 1 else merge(answers, k)

    # ------------------------------------------------------------ the items themselves

    def list_of_item(self) -> np.ndarray:
        """The list (I,) each item lies in, int32; read from the lists at the first call."""
        with self._lock:
            if self._list_of_item is None:
                list_I = np.zeros(self.num_items, np.int32)
                for part in self.parts:
                    for number in range(self.num_lists):
                        list_I[part.ids_of_list(number) + part.first_row] = number
                self._list_of_item = list_I
            return self._list_of_item

    def vectors_of(self, item_rows: np.ndarray) -> np.ndarray:
        """The items' vectors as far as the index keeps them, in the space of `score_space`."""
        vectors = []
        for part in self.parts:
            is_here = (item_rows >= part.first_row) & (item_rows < part.first_row + part.num_items)
            rows = item_rows[is_here] - part.first_row
            source = part.refine if part.refine is not None else part.base
            if part.has_lists and part.refine is None:
                with self._lock:
                    if part.base.direct_map.no():
                        part.base.make_direct_map()
            vectors.append(source.reconstruct_batch(rows) if len(rows) else np.empty((0, source.d), np.float32))
        return np.concatenate(vectors)

    def score_space(self, user_BD: np.ndarray) -> np.ndarray:
        """The users as `vectors_of` wants them for inner products."""
        first = self.parts[0]
        return user_BD if first.refine is not None else first.transformed(user_BD)

    def scan_some(self, user_BD: np.ndarray, k: int, item_rows: np.ndarray, vectors: np.ndarray) -> Answer:
        """The best `k` of the given items, all of them scored."""
        score_BK, place_BK = best_of_all(np.ascontiguousarray(self.score_space(user_BD)), vectors, k)
        item_row_BK = np.where(place_BK >= 0, item_rows[place_BK], -1) if len(item_rows) else place_BK
        return score_BK, item_row_BK


def scan_preassigned(
    ivf: Any, user_BD: np.ndarray, k: int, score_BP: np.ndarray, list_BP: np.ndarray, parameters: Any
) -> Answer:
    """FAISS's search of given lists; its Python wrapper takes no parameters, and rows of fewer lists end in -1."""
    score_BK = np.empty((len(user_BD), k), np.float32)
    row_BK = np.empty((len(user_BD), k), np.int64)
    pointer = faiss.swig_ptr
    user_BD = np.ascontiguousarray(user_BD)
    ivf.search_preassigned_c(
        len(user_BD), pointer(user_BD), k, pointer(list_BP), pointer(score_BP), pointer(score_BK), pointer(row_BK),
        False, parameters,
    )  # fmt: skip
    score_BK[row_BK < 0] = -np.inf
    return score_BK, row_BK


def _parameters(kind: Any, part: Part, bitmap: np.ndarray | None) -> tuple[Any, Any]:
    """FAISS's parameters of one search, and what must outlive it."""
    parameters = kind()
    if bitmap is None:
        return parameters, None
    bits = _bits_of(part, bitmap)
    selector = faiss.IDSelectorBitmap(bits)
    parameters.sel = selector
    return parameters, (selector, bits)


def _bits_of(part: Part, bitmap: np.ndarray | None) -> np.ndarray | None:
    """The part's own bits of a bitmap of all items."""
    if bitmap is None:
        return None
    assert part.first_row % 8 == 0, "a shard begins within a byte of the bitmap"
    return bitmap[part.first_row // 8 : (part.first_row + part.num_items + 7) // 8]


def merge(answers: Sequence[Answer], k: int) -> Answer:
    """The best `k` of several answers that share no item."""
    score_BC = np.concatenate([score for score, _ in answers], axis=1)
    row_BC = np.concatenate([row for _, row in answers], axis=1)
    order_BK = np.argsort(-score_BC, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(score_BC, order_BK, axis=1), np.take_along_axis(row_BC, order_BK, axis=1)


# ---------------------------------------------------------------- GPU


class _GpuCopies:
    """The parts on this process's GPU, or spread over all of them where it has several to itself.

    One search at a time: a GPU's scratch memory is not shared. GPU indexes know no selectors, and of neighbours and
    lists no more than GPU_LIMIT: searches with filters or longer answers go to the CPU, lists are taken by portions.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        import torch.distributed

        # A rank of a job has the GPU that the job gave it, and no other
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self._lock = threading.Lock()
        self._resources = faiss.StandardGpuResources()  # 1.5 GiB of scratch memory on each GPU, once for all parts
        self._parts = []
        for number, part in enumerate(parts):
            gpu = number % faiss.get_num_gpus() if alone and len(parts) > 1 else None
            self._parts.append((to_gpu(self._resources, part.base, gpu), part.first_row))

    def scan(self, vector_BD: np.ndarray, k: int, score_BP: np.ndarray, list_BP: np.ndarray) -> Answer:
        answers = []
        portions = math.ceil(list_BP.shape[1] / GPU_LIMIT)
        with self._lock:
            for index, first_row in self._parts:
                for lists in np.array_split(np.arange(list_BP.shape[1]), portions):
                    parameters = faiss.SearchParametersIVF()
                    parameters.nprobe = len(lists)
                    portion = np.ascontiguousarray(score_BP[:, lists]), np.ascontiguousarray(list_BP[:, lists])
                    score_BK, row_BK = scan_preassigned(index, vector_BD, k, *portion, parameters)
                    answers.append((score_BK, np.where(row_BK >= 0, row_BK + first_row, -1)))
        return answers[0] if len(answers) == 1 else merge(answers, k)

    def search(self, vector_BD: np.ndarray, k: int) -> Answer:
        answers = []
        with self._lock:
            for index, first_row in self._parts:
                score_BK, row_BK = index.search(vector_BD, k)
                score_BK[row_BK < 0] = -np.inf
                answers.append((score_BK, np.where(row_BK >= 0, row_BK + first_row, -1)))
        return answers[0] if len(answers) == 1 else merge(answers, k)


def _gpu_copies(parts: Sequence[Part], device: Device) -> _GpuCopies | None:
    """The parts on GPUs where FAISS has their kind there; None, or an error if a GPU is demanded, where it has not."""
    first = parts[0]
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ, faiss.IndexFlat)
    fits = isinstance(first.base, kinds) and first.refine is None
    if fits and first.has_lists:
        fits = isinstance(first.quantizer, faiss.IndexFlat)
    why = ""
    if fits:
        try:
            return _GpuCopies(parts)
        except RuntimeError as error:  # codes that it has not there, such as SQbf16 or PQ16x4, or memory
            why = f" ({reason_of(error)})"
    if device == "gpu":
        raise ConfigError(
            f"index.device is 'gpu' but FAISS has no {type(first.base).__name__}"
            f"{' that is scored again' if first.refine is not None else ''} there{why}: take IVF lists of Flat, "
            "SQfp16, SQ8 or PQ codes, or set index.device = auto."
        )
    return None
