"""The chosen lists scanned by a loop of ours, where FAISS keeps plain numbers in them (Flat, SQfp16, SQ8).

What it saves against FAISS's own search of given lists: many users are scanned list by list, so that a list is read
from memory once for all who want it, and an item is only kept in sight if it beats the user's worst of twice k so far,
which costs no heap. Half precision is widened as it is read. The answers are the same.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from trec_twotower.data.kernels import IS_COMPILED, kernel
from trec_twotower.exhaustive import SPARE, hand_over, to_the_front
from trec_twotower.index.engine import faiss

FLOAT, HALF, BYTE = 0, 1, 2  # how a list holds a number
TOGETHER = 8  # users from whom on lists are scanned one after another for all of them
USERS_PER_THREAD = 64  # at least, for a thread of its own to be worth it
LANES = 16  # numbers that are multiplied at once
IN_SIGHT = 1 << 20  # of all users of a block

try:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:  # pragma: no cover - doctor says so
    assert not IS_COMPILED


def list_places(ivf: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many items each list has (L,), and the addresses of their codes and of their ids, int64.

    Read all at once from the arrays in which FAISS keeps that, where these lie as they do in the versions known; else
    asked for list by list, which takes milliseconds.
    """
    lists, num_lists = faiss.downcast_InvertedLists(ivf.invlists), ivf.nlist
    places = None
    if isinstance(lists, faiss.OnDiskInvertedLists):
        places = _words(lists.lists.this, num_lists, 3)  # size, capacity, offset
        if places is not None:
            code_L = int(lists.ptr) + places[:, 2]
            found = places[:, 0].copy(), code_L, code_L + places[:, 1] * ivf.code_size
    elif isinstance(lists, faiss.ArrayInvertedLists):
        places, ids = (_words(each, num_lists, 10) for each in (lists.codes.this, lists.ids))
        if places is not None and ids is not None:  # 8 words of who owns it, where it lies, how long it is
            found = places[:, 9] // ivf.code_size, places[:, 8].copy(), ids[:, 8].copy()
    some = {0, num_lists // 2, num_lists - 1}
    if places is not None and all(_lies_there(lists, number, found) for number in some):
        return found
    asked = [
        (lists.list_size(number), int(lists.get_codes(number) or 0), int(lists.get_ids(number) or 0))
        for number in range(num_lists)
    ]
    size_L, code_L, id_L = np.array(asked, np.int64).reshape(-1, 3).T.copy()
    return size_L, code_L, id_L


def _words(vector: Any, count: int, width: int) -> np.ndarray | None:
    """The elements of a std::vector as rows of `width` words; None where they are of another size."""
    first, end = np.ctypeslib.as_array(ctypes.cast(int(vector), ctypes.POINTER(ctypes.c_int64)), (2,)).tolist()
    if not count or end - first != 8 * width * count:
        return None
    return np.ctypeslib.as_array(ctypes.cast(first, ctypes.POINTER(ctypes.c_int64)), (count, width))


def _lies_there(lists: Any, number: int, found: tuple[np.ndarray, ...]) -> bool:
    size, codes, ids = (int(part[number]) for part in found)
    if size != lists.list_size(number):
        return False
    return size == 0 or (codes == int(lists.get_codes(number)) and ids == int(lists.get_ids(number)))


class ListScan:
    """The lists of one FAISS index, by where they lie in memory; `of` makes one where the kind of lists allows."""

    def __init__(self, ivf: Any, kind: int) -> None:
        self.kind, self.dim = kind, ivf.d
        self._owner = ivf
        self.size_L, self._codes_L, self._ids_L = list_places(ivf)
        self._least_D = self._step_D = None
        if kind == BYTE:  # number = least + step * (byte + 1/2)
            trained_2D = faiss.vector_to_array(ivf.sq.trained).reshape(2, self.dim)
            self._step_D = trained_2D[1] / np.float32(255)
            self._least_D = trained_2D[0] + self._step_D / 2
        self._is_residual = kind != FLOAT and ivf.by_residual  # of the list's centroid, whose score is added

    @classmethod
    def of(cls, ivf: Any) -> ListScan | None:
        if not IS_COMPILED or ivf.metric_type != faiss.METRIC_INNER_PRODUCT:
            return None
        if isinstance(ivf, faiss.IndexIVFFlat):
            return cls(ivf, FLOAT)
        if isinstance(ivf, faiss.IndexIVFScalarQuantizer):
            quantizer = faiss.ScalarQuantizer
            if ivf.sq.qtype == quantizer.QT_fp16:
                return cls(ivf, HALF)
            if ivf.sq.qtype == quantizer.QT_8bit:
                return cls(ivf, BYTE)
        return None

    def scan(
        self,
        user_BD: np.ndarray,
        k: int,
        score_BP: np.ndarray,
        list_BP: np.ndarray,
        bits: np.ndarray | None = None,
        bound_B: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As FAISS's search of given lists: scores and rows (B, k), ending in -inf and -1.

        `list_BP` ends in -1 where a user has fewer lists; `bits` is a bitmap of the rows that count. `bound_B` is what
        a user's k-th best is likely to beat: where it does not, the lists are scanned again without.
        """
        found = np.empty((len(user_BD), k), np.float32), np.empty((len(user_BD), k), np.int64)
        is_bounded = bound_B is not None
        # A copy, as the scan raises it
        worst_B = np.array(bound_B, np.float32) if is_bounded else np.full(len(user_BD), -np.inf, np.float32)
        if len(user_BD) < TOGETHER:
            self._scan(user_BD, score_BP, list_BP, bits, worst_B, *found)
        else:
            self._scan_blocks(user_BD, score_BP, list_BP, bits, worst_B, found)
        if is_bounded:
            short = np.flatnonzero(found[1][:, -1] < 0)
            if len(short):
                found[0][short], found[1][short] = self.scan(user_BD[short], k, score_BP[short], list_BP[short], bits)
        return found

    def _scan_blocks(
        self,
        user_BD: np.ndarray,
        score_BP: np.ndarray,
        list_BP: np.ndarray,
        bits: np.ndarray | None,
        worst_B: np.ndarray,
        found: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Blocks of users, by several threads where FAISS would take several."""
        threads = max(1, min(faiss.omp_get_max_threads(), len(user_BD) // USERS_PER_THREAD))
        step = max(TOGETHER, min(-(-len(user_BD) // threads), IN_SIGHT // (2 * found[0].shape[1])))

        def scan(start: int) -> None:
            users = slice(start, start + step)
            self._scan(
                user_BD[users], score_BP[users], list_BP[users], bits, worst_B[users], found[0][users], found[1][users]
            )

        starts = range(0, len(user_BD), step)
        if threads == 1 or len(starts) == 1:
            for start in starts:
                scan(start)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(scan, starts))

    def _scan(
        self,
        user_BD: np.ndarray,
        score_BP: np.ndarray,
        list_BP: np.ndarray,
        bits: np.ndarray | None,
        worst_B: np.ndarray,
        score_BK: np.ndarray,
        row_BK: np.ndarray,
    ) -> None:
        num_users, num_lists = list_BP.shape
        weight_BD, start_BP = user_BD, _NOTHING
        if self._is_residual:
            start_BP = score_BP
        if self._step_D is not None:
            least_B1 = (user_BD @ self._least_D)[:, None]
            start_BP = start_BP + least_B1 if self._is_residual else np.repeat(least_B1, num_lists, axis=1)
            weight_BD = weight_BD * self._step_D
        if num_users < TOGETHER:
            order_N = _counting(num_users * num_lists)
        else:  # everybody's best list first, which says what is worth keeping
            later_P = (_counting(num_lists) > 0) * (1 + self.size_L.size)
            order_N = np.argsort((list_BP + later_P).ravel(), kind="stable")
        _scan(
            self.kind, self._codes_L, self._ids_L, self.size_L, weight_BD, start_BP, list_BP, order_N,
            _NO_BITS if bits is None else bits, worst_B, score_BK, row_BK,
        )  # fmt: skip


@lru_cache
def _counting(count: int) -> np.ndarray:
    return np.arange(count)


_NO_BITS = np.empty(0, np.uint8)
_NOTHING = np.empty((0, 0), np.float32)


if IS_COMPILED:

    def _loader(element: Any, number: Any, widen: str | None) -> Any:
        """A function (address, place) -> the number that lies there."""

        @intrinsic
        def load(context: Any, address: Any, place: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                first = builder.inttoptr(arguments[0], ir.PointerType(element))
                value = builder.load(builder.gep(first, [arguments[1]]), align=1)
                return getattr(builder, widen)(value, ir.FloatType()) if widen else value

            return number(types.int64, types.int64), generate

        return load

    def _four_products(element: Any, element_bytes: int, widen: str | None) -> Any:
        """A function (addresses of four items, of a user, blocks) -> four inner products over 16 x blocks axes.

        Written out in vectors of 16, as the compiler's own loop adds up each product by itself, in as many steps as
        the products take; here the four are added up together.
        """
        lanes, packed = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(element, LANES)

        def halves(builder: Any, one: Any, other: Any, run: int) -> Any:
            """Runs of two vectors, every second added to the one before."""
            number = one.type.count
            both = range(2 * number) if one is not other else range(number)
            even = [at for at in both if at // run % 2 == 0]
            indices = (ir.Constant(ir.VectorType(ir.IntType(32), len(even)), [at + more for at in even])
                       for more in (0, run))  # fmt: skip
            return builder.fadd(*(builder.shuffle_vector(one, other, index) for index in indices))

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *items, user, blocks = arguments
            totals = [cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * LANES)) for _ in items]
            with cgutils.for_range(builder, blocks) as loop:

                def at(address: Any, kind: Any, block_bytes: int) -> Any:
                    moved = builder.add(address, builder.mul(loop.index, ir.Constant(ir.IntType(64), block_bytes)))
                    return builder.load(builder.inttoptr(moved, kind.as_pointer()), align=1)

                weights = at(user, lanes, 4 * LANES)
                for item, total in zip(items, totals, strict=True):
                    numbers = at(item, packed, element_bytes * LANES)
                    if widen:
                        numbers = getattr(builder, widen)(numbers, lanes)
                    product = builder.fmul(numbers, weights, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            first, second, third, fourth = map(builder.load, totals)
            sums = halves(builder, halves(builder, first, second, 8), halves(builder, third, fourth, 8), 4)
            sums = halves(builder, sums, sums, 2)
            sums = halves(builder, sums, sums, 1)
            each = [builder.extract_element(sums, ir.Constant(ir.IntType(32), at)) for at in range(4)]
            return context.make_tuple(builder, signature.return_type, each)

        @intrinsic
        def four(context: Any, one: Any, two: Any, three: Any, other: Any, user: Any, blocks: Any) -> Any:
            return types.UniTuple(types.float32, 4)(*[types.int64] * 6), generate

        return four

    _float_at = _loader(ir.FloatType(), types.float32, None)
    _half_at = _loader(ir.HalfType(), types.float32, "fpext")
    _byte_at = _loader(ir.IntType(8), types.float32, "uitofp")
    _id_at = _loader(ir.IntType(64), types.int64, None)
    _four_floats = _four_products(ir.FloatType(), 4, None)
    _four_halves = _four_products(ir.HalfType(), 2, "fpext")
    _four_bytes = _four_products(ir.IntType(8), 1, "uitofp")


@kernel
def _more_axes(kind: int, item: int, user: int, first: int, dim: int) -> float:
    """The inner product over the axes from `first` on."""
    total = np.float32(0)
    for axis in range(first, dim):
        weight = _float_at(user, axis)
        if kind == FLOAT:
            total += weight * _float_at(item, axis)
        elif kind == HALF:
            total += weight * _half_at(item, axis)
        else:
            total += weight * _byte_at(item, axis)
    return float(total)


@kernel
def _scan(
    kind: int,
    codes_L: np.ndarray,
    ids_L: np.ndarray,
    size_L: np.ndarray,
    weight_BD: np.ndarray,
    start_BP: np.ndarray,
    list_BP: np.ndarray,
    order_N: np.ndarray,
    bits: np.ndarray,
    worst_B: np.ndarray,
    score_BK: np.ndarray,
    row_BK: np.ndarray,
) -> None:
    """Scans the lists at `order_N` of `list_BP`, one after another.

    An item must beat `worst_B`, which rises with what is found; W > K candidates of each user are held.
    """
    num_users, k = score_BK.shape
    width, dim = max(2 * k, k + SPARE), weight_BD.shape[1]
    score_BW, row_BW = np.empty((num_users, width), np.float32), np.empty((num_users, width), np.int64)
    weights_at = weight_BD.ctypes.data
    blocks = dim // LANES
    is_whole = LANES * blocks == dim
    item_bytes = dim * (4 if kind == FLOAT else 2 if kind == HALF else 1)
    count_B = np.zeros(num_users, np.int64)
    place = np.empty(4, np.int64)  # of four items in their list
    score = np.empty(4, np.float32)
    for n in range(order_N.size):
        user, at = divmod(order_N[n], list_BP.shape[1])
        number = list_BP[user, at]
        if number < 0:
            continue
        start = start_BP[user, at] if start_BP.size else np.float32(0)
        codes, ids, size = codes_L[number], ids_L[number], size_L[number]
        weights = weights_at + 4 * dim * user
        count, worst = count_B[user], worst_B[user]
        next_place = 0
        while next_place < size:
            found = 0
            if not bits.size and next_place + 4 <= size:
                place[0], place[1], place[2], place[3] = next_place, next_place + 1, next_place + 2, next_place + 3
                found = 4
                next_place += 4
            while found < 4 and next_place < size:
                place[found] = next_place
                if bits.size:  # counted without a branch, which nobody could foresee
                    row = _id_at(ids, next_place)
                    found += (bits[row >> 3] >> (row & 7)) & 1
                else:
                    found += 1
                next_place += 1
            if found == 0:
                break
            for i in range(found, 4):
                place[i] = place[0]
            one, two = codes + place[0] * item_bytes, codes + place[1] * item_bytes
            three, four = codes + place[2] * item_bytes, codes + place[3] * item_bytes
            if kind == FLOAT:
                first, second, third, fourth = _four_floats(one, two, three, four, weights, blocks)
            elif kind == HALF:
                first, second, third, fourth = _four_halves(one, two, three, four, weights, blocks)
            else:
                first, second, third, fourth = _four_bytes(one, two, three, four, weights, blocks)
            if is_whole and start + max(max(first, second), max(third, fourth)) <= worst:
                continue
            score[0], score[1], score[2], score[3] = first, second, third, fourth
            for i in range(found):
                value = start + score[i]
                if not is_whole:
                    value += _more_axes(kind, codes + place[i] * item_bytes, weights, LANES * blocks, dim)
                if value > worst:
                    score_BW[user, count] = value
                    row_BW[user, count] = _id_at(ids, place[i])
                    count += 1
                    if count == width:
                        worst = to_the_front(score_BW[user], row_BW[user], count, k)
                        count = k
        count_B[user], worst_B[user] = count, worst
    for user in range(num_users):
        hand_over(score_BW[user], row_BW[user], count_B[user], score_BK[user], row_BK[user])
