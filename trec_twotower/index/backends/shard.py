"""The parts of one FAISS index: transforms of the vectors, the index that is scanned, and the codes that refine."""

from __future__ import annotations

from typing import Any

import numpy as np

from trec_twotower.errors import ConfigError
from trec_twotower.index.backends.faiss_backend import code_bytes, faiss, float_codes, inner_products
from trec_twotower.index.exact import ROUNDING

PLAIN_TYPES = (faiss.ScalarQuantizer.QT_fp16, faiss.ScalarQuantizer.QT_bf16)  # numbers of these need no training
HALF_MAX = 65_504.0  # the largest half-precision number
DECODED_NUMBERS = 1 << 22  # numbers of codes that are decoded together: 16 MiB


class Shard:
    """A FAISS index of the items of consecutive rows, the first `first_row`."""

    def __init__(self, whole: Any, first_row: int = 0) -> None:
        self._owner = whole  # FAISS's downcasts do not keep what they point to alive
        self.whole = faiss.downcast_index(whole)
        self.first_row = first_row
        self.num_items = self.whole.ntotal
        self.refine: Any = None
        self.wrappers = []  # indexes around the scanned one
        self._transforms: list[Any] = []
        inner = self.whole
        if isinstance(inner, faiss.IndexIDMap | faiss.IndexIDMap2):
            raise ConfigError(
                "index.factory has an IDMap, which hides the lists from tuning. Leave it out, since item rows are ids."
            )
        if isinstance(inner, faiss.IndexRefine):
            self.wrappers.append(inner)
            self.refine = faiss.downcast_index(inner.refine_index)
            inner = faiss.downcast_index(inner.base_index)
            if not isinstance(self.refine, faiss.IndexFlatCodes):
                raise ConfigError(
                    f"index.factory refines by a {type(self.refine).__name__}, which does not store the items in "
                    "order. Use RFlat, Refine(SQfp16) or Refine(SQ8)."
                )
        if isinstance(inner, faiss.IndexPreTransform):
            self.wrappers.append(inner)
            self._transforms = [faiss.downcast_VectorTransform(inner.chain.at(i)) for i in range(inner.chain.size())]
            inner = faiss.downcast_index(inner.index)
        self.base = inner
        self.quantizer: Any = faiss.downcast_index(inner.quantizer) if isinstance(inner, faiss.IndexIVF) else None
        self._check_metric()

    def _check_metric(self) -> None:
        for each in (self.whole, self.base, *([self.quantizer] if self.quantizer is not None else [])):
            if each.metric_type != faiss.METRIC_INNER_PRODUCT:
                raise ConfigError(
                    f"{type(each).__name__} compares by another metric than the inner product, by which users and "
                    "items are scored. Build the index with METRIC_INNER_PRODUCT."
                )

    # ------------------------------------------------------------ training

    @property
    def has_codes(self) -> bool:
        """Return whether the scanned index stores codes that must be trained."""
        if isinstance(self.base, faiss.IndexIVFScalarQuantizer):
            return self.base.sq.qtype not in PLAIN_TYPES
        return not isinstance(self.base, faiss.IndexIVFFlat)

    def transformed(self, vectors: np.ndarray) -> np.ndarray:
        """Return the vectors in the space of the scanned index."""
        for transform in self._transforms:
            vectors = transform.apply(vectors)
        return vectors

    def query_vectors(self, user_BD: np.ndarray) -> np.ndarray:
        """Return the users in the space of the scanned index; no user's vector depends on the rest of the batch."""
        for transform in self._transforms:
            if not isinstance(transform, faiss.LinearTransform):
                user_BD = transform.apply(user_BD)
                continue
            axes_OD = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
            every_BO = np.broadcast_to(np.arange(transform.d_out), (len(user_BD), transform.d_out))
            user_BD = inner_products(user_BD, axes_OD, every_BO)
            if transform.have_bias:
                user_BD += faiss.vector_to_array(transform.b)
        return user_BD

    def train_transforms(self, item_CD: np.ndarray) -> None:
        for transform in self._transforms:
            if not transform.is_trained:
                transform.train(item_CD)
            item_CD = transform.apply(item_CD)

    # ------------------------------------------------------------ stored vectors

    def bits(self, bitmap: np.ndarray) -> np.ndarray:
        """Return this shard's bits of a bitmap of all items."""
        assert self.first_row % 8 == 0, "a shard begins within a byte of the bitmap"
        return bitmap[self.first_row // 8 : (self.first_row + self.num_items + 7) // 8]

    def score_again(self, user_BD: np.ndarray, row_BC: np.ndarray) -> np.ndarray:
        """Return the scores (B, C) of rows of this shard by the refining codes."""
        if isinstance(self.refine, faiss.IndexFlat):
            return inner_products(user_BD, float_codes(self.refine), row_BC)
        score_BC = np.empty(row_BC.shape, np.float32)
        code_IC = code_bytes(self.refine)
        block = max(1, DECODED_NUMBERS // (row_BC.shape[1] * self.refine.d))
        for start in range(0, len(row_BC), block):
            users = slice(start, start + block)
            rows = row_BC[users].reshape(-1)
            item_CD = self.refine.sa_decode(code_IC.take(np.maximum(rows, 0), axis=0))
            at_BC = np.where(rows >= 0, np.arange(len(rows)), -1).reshape(row_BC[users].shape)
            score_BC[users] = inner_products(user_BD[users], item_CD, at_BC)
        return score_BC

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows of this shard as far as it stores them: before transforms if it refines."""
        source = self.refine if self.refine is not None else self.base
        return source.reconstruct_batch(rows) if len(rows) else np.empty((0, source.d), np.float32)

    def rounding_slack(self, user_BD: np.ndarray, max_norm: float) -> np.ndarray:
        return 2 * ROUNDING * np.sqrt(self.base.d) * max_norm * np.linalg.norm(user_BD, axis=1)
