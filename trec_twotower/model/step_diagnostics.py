"""Diagnostics of a logged step: ranking accuracy, vector lengths and score histograms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.losses import Relations

SAMPLE_ROWS = 512  # rows per rank that are ranked: a fraction of a percent of a step's multiplications
HISTOGRAM_CELLS = 1 << 18  # scores that are sorted into bins

# Cosines are in [-1, 1]: forty equal bins. Dot products have no bound: bins that widen away from zero.
_COSINE_EDGES = np.linspace(-1.0, 1.0, 41)
_WIDE = 10.0 ** np.linspace(-2, 3, 21)
_PRODUCT_EDGES = np.concatenate([-_WIDE[::-1], [0.0], _WIDE])


@dataclass(frozen=True)
class Histogram:
    """Counts between ascending edges; values beyond the outer edges count in the outer bins."""

    edges: np.ndarray
    counts: np.ndarray  # one fewer than edges

    def mean(self) -> float:
        """Return the mean, with every value at the middle of its bin; 0 if there are no values."""
        middle = (self.edges[1:] + self.edges[:-1]) / 2
        return float(self.counts @ middle / max(self.counts.sum(), 1.0))


class StepDiagnostics:
    """Records diagnostics of a step's vectors, without another table lookup; all ranks record the same steps."""

    def __init__(self, *, is_unit: bool) -> None:
        self.edges = _COSINE_EDGES if is_unit else _PRODUCT_EDGES
        self._lengths: dict[str, tuple[float, int]] = {}
        self._recorded: np.ndarray | None = None

    def record_length(self, side: str, vector_BD: Tensor) -> None:
        """Record the mean length of one tower's vectors, before normalization."""
        length_B = torch.linalg.vector_norm(vector_BD.detach().float(), dim=1)
        self._lengths[side] = (float(length_B.sum()), len(length_B))

    @torch.no_grad()
    def record(self, user_BD: Tensor, item_CD: Tensor, relations: Relations) -> None:
        """Rank the positives of some rows among the candidates that are negatives of all rows, and bin the scores."""
        user_BD, item_CD = user_BD.detach().float(), item_CD.detach().float()
        every = max(1, -(-len(user_BD) // SAMPLE_ROWS))  # every n-th row
        score_bC = user_BD[::every] @ item_CD.T
        if score_bC.ndim == 3:  # several vectors per row
            score_bC = score_bC.amax(1)
        positive, known = relations.positive, relations.known
        is_ranked = positive.row_P % every == 0
        row_p, column_p = positive.row_P[is_ranked] // every, positive.column_P[is_ranked]
        score_p = score_bC[row_p, column_p]
        if relations.is_negative_C is not None:
            score_bC.masked_fill_(~relations.is_negative_C, -torch.inf)
        hidden = known.row_P % every == 0
        score_bC[known.row_P[hidden] // every, known.column_P[hidden]] = -torch.inf
        hits = (score_p > score_bC.amax(1)[row_p]).sum() if len(score_p) else 0
        sample = score_bC[: max(1, HISTOGRAM_CELLS // max(score_bC.shape[1], 1))].flatten()
        self._recorded = np.concatenate(
            [[float(hits), len(score_p)], self._counts(score_p), self._counts(sample[sample > -torch.inf])]
        )

    def _counts(self, scores: Tensor) -> np.ndarray:
        inner = torch.as_tensor(self.edges[1:-1], dtype=scores.dtype, device=scores.device)
        return torch.bincount(torch.bucketize(scores, inner), minlength=len(self.edges) - 1).double().cpu().numpy()

    def figures(self, ranks: Ranks) -> dict[str, float | Histogram]:
        """Return the diagnostics recorded since the last call, over all ranks, which call together; {} if none."""
        if self._recorded is None:
            return {}
        lengths = np.array([self._lengths.get(side, (0.0, 0)) for side in ("user", "item")]).ravel()
        total = ranks.sum(np.concatenate([lengths, self._recorded]))
        self._recorded = None
        (users, items, (hits, positives)), counts = total[:6].reshape(3, 2), total[6:]
        bins = len(self.edges) - 1
        return {
            "accuracy": hits / max(positives, 1.0),
            "user_length": users[0] / max(users[1], 1.0),
            "item_length": items[0] / max(items[1], 1.0),
            "positive_scores": Histogram(self.edges, counts[:bins]),
            "negative_scores": Histogram(self.edges, counts[bins:]),
        }
